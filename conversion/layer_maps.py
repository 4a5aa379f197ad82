"""Which source layers become which layer of a recursive model (MoR, arXiv 2507.10524, Table 1 and section 2.1).

A source of L layers becomes `prelude` unique layers, b shared layers that are applied N_r times, and `coda` unique
layers. Everything here is arithmetic on indices.
"""

import random
from dataclasses import dataclass

from .errors import ConversionError


INITIALISATIONS = ("stepwise", "average", "lower", "upper", "random")


@dataclass(frozen=True)
class LayerMap:
    """Source layers of a recursive model.

    Attributes:
        prelude_layers: unique layers in front, extra ones included.
        coda_layers: unique layers at the end, extra ones included.
        num_recursions: N_r.
        num_shared_layers: b.
        sequence: whether each shared layer is repeated in place, instead of the whole block.
        sources: for each physical layer the source layers it is made of; several are averaged.
        dropped: source layers that the official dropping removes; their weights are used by no initialisation.
        extra_prelude: how many of `prelude_layers` exist because the depth does not divide.
        extra_coda: the same for `coda_layers`.
    """

    prelude_layers: int
    coda_layers: int
    num_recursions: int
    num_shared_layers: int
    sequence: bool
    sources: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...] = ()
    extra_prelude: int = 0
    extra_coda: int = 0

    @property
    def unrolled_depth(self) -> int:
        """Layer applications of a token that skips nothing."""
        return self.prelude_layers + self.num_recursions * self.num_shared_layers + self.coda_layers

    def unrolled_positions(self, layer: int) -> list[int]:
        """Unrolled indices at which a physical layer is applied."""
        p, b, n = self.prelude_layers, self.num_shared_layers, self.num_recursions
        if layer < p:
            return [layer]
        if layer >= p + b:
            return [layer - b + b * n]
        return _group(layer - p, p, b, n, self.sequence)

    def replaced_sources(self, layer: int) -> list[int]:
        """Source layers in whose places a physical layer is applied, one for each of its applications."""
        kept = [i for i in range(self.unrolled_depth + len(self.dropped)) if i not in self.dropped]
        return [kept[position] for position in self.unrolled_positions(layer)]


def even_spread(first: int, last: int, count: int) -> list[int]:
    """`round(linspace(first, last, count))` in floating point, whose errors decide where a half is rounded to."""
    if count == 1:
        return [first]
    step = (last - first) / (count - 1)
    return [round(i * step + first) for i in range(count - 1)] + [last]


def place_remainder(remainder: int) -> tuple[int, int]:
    """Extra unique layers (in front, at the end) where the depth does not divide: by turns, the end first.

    The last layers form the output and stand repetition worse than the first ones: SmolLM2-135M with N_r = 3 and
    `stepwise` starts at a lower loss with one more coda layer than with one more prelude layer.
    """
    return remainder // 2, (remainder + 1) // 2


def map_layers(
    num_layers: int,
    num_recursions: int,
    sharing: str,
    init: str,
    *,
    prelude_layers: int | None = None,
    coda_layers: int | None = None,
    drop_layers: bool = False,
    seed: int = 0,
) -> LayerMap:
    """Chooses the source layers of every physical layer.

    With `drop_layers` the source first loses the layers that do not fit, as the official code does; without, every
    source layer keeps its place in the unrolled model and the remainder becomes extra unique layers.

    Args:
        num_layers (`int`): L, depth of the source.
        num_recursions (`int`): N_r.
        sharing (`str`): `cycle`, `sequence`, `middle_cycle` or `middle_sequence`.
        init (`str`): one of `INITIALISATIONS`.
        prelude_layers, coda_layers (`int`, *optional*): default 1 for the `middle_` forms, else 0.
        drop_layers (`bool`): drop layers instead of making them unique.
        seed (`int`): of the `random` initialisation.

    Raises:
        ConversionError: if the depth is too small, or a value is not allowed.
    """
    if init not in INITIALISATIONS:
        raise ConversionError(f"`init` is {init!r}, but must be one of {', '.join(map(repr, INITIALISATIONS))}.")
    unique = 1 if sharing.startswith("middle_") else 0
    prelude = unique if prelude_layers is None else prelude_layers
    coda = unique if coda_layers is None else coda_layers
    for field, value, least in (
        ("num_recursions", num_recursions, 1),
        ("prelude_layers", prelude, 0),
        ("coda_layers", coda, 0),
    ):
        if value < least:
            raise ConversionError(f"`{field}` is {value}, but must be at least {least}.")
    looped = num_layers - prelude - coda
    if looped < num_recursions:
        raise ConversionError(
            f"`num_recursions` is {num_recursions}, but the {num_layers} layers of the source leave {max(looped, 0)} "
            f"between {prelude} prelude and {coda} coda layers; use at most {max(looped, 1)} recursions or fewer "
            "unique layers."
        )
    remainder = looped % num_recursions
    extra_prelude, extra_coda = (0, 0) if drop_layers else place_remainder(remainder)
    prelude, coda = prelude + extra_prelude, coda + extra_coda
    shared = looped // num_recursions

    if drop_layers and remainder:
        middle = even_spread(prelude, num_layers - coda - 1, shared * num_recursions)
        kept = [*range(prelude), *middle, *range(num_layers - coda, num_layers)]
    else:
        kept = list(range(num_layers))
    sequence = sharing.endswith("sequence")
    groups = _shared_sources(init, prelude, len(kept) - coda, shared, num_recursions, sequence, seed)
    chosen = [[i] for i in range(prelude)] + groups + [[i] for i in range(len(kept) - coda, len(kept))]
    return LayerMap(
        prelude_layers=prelude,
        coda_layers=coda,
        num_recursions=num_recursions,
        num_shared_layers=shared,
        sequence=sequence,
        sources=tuple(tuple(kept[i] for i in group) for group in chosen),
        dropped=tuple(sorted(set(range(num_layers)) - set(kept))),
        extra_prelude=extra_prelude,
        extra_coda=extra_coda,
    )


def _shared_sources(
    init: str, start: int, end: int, shared: int, num_recursions: int, sequence: bool, seed: int
) -> list[list[int]]:
    """Source layers of each shared layer, out of `start <= layer < end`."""
    if init == "average":
        return [_group(i, start, shared, num_recursions, sequence) for i in range(shared)]
    if init == "stepwise":
        layers = even_spread(start, end - 1, shared)
    elif init == "lower":
        layers = list(range(start, start + shared))
    elif init == "upper":
        layers = list(range(end - shared, end))
    else:
        layers = sorted(random.Random(seed).sample(range(start, end), shared))
    return [[layer] for layer in layers]


def _group(i: int, start: int, shared: int, num_recursions: int, sequence: bool) -> list[int]:
    """Unrolled layers that shared layer `i` stands for (paper, Table 1)."""
    if sequence:
        return [start + i * num_recursions + r for r in range(num_recursions)]
    return [start + i + r * shared for r in range(num_recursions)]
