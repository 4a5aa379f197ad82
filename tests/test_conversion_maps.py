"""Layer maps and initialisations against worked examples of the paper's formulas."""

import numpy
import pytest

from varidepth.conversion.errors import ConversionError
from varidepth.conversion.layer_maps import INITIALISATIONS, even_spread, map_layers, place_remainder


# depth, recursions, sharing, shared layers, unrolled depth, dropped, first group, last group (unrolled positions)
DROPPING = [
    (30, 2, "cycle", 15, 30, (), [0, 15], [14, 29]),
    (30, 2, "sequence", 15, 30, (), [0, 1], [28, 29]),
    (30, 2, "middle_cycle", 14, 30, (), [1, 15], [14, 28]),
    (30, 2, "middle_sequence", 14, 30, (), [1, 2], [27, 28]),
    (30, 3, "cycle", 10, 30, (), [0, 10, 20], [9, 19, 29]),
    (30, 3, "sequence", 10, 30, (), [0, 1, 2], [27, 28, 29]),
    (30, 3, "middle_cycle", 9, 29, (14,), [1, 10, 19], [9, 18, 27]),
    (30, 3, "middle_sequence", 9, 29, (14,), [1, 2, 3], [25, 26, 27]),
    (30, 4, "cycle", 7, 28, (7, 22), [0, 7, 14, 21], [6, 13, 20, 27]),
    (30, 4, "sequence", 7, 28, (7, 22), [0, 1, 2, 3], [24, 25, 26, 27]),
    (30, 4, "middle_cycle", 7, 30, (), [1, 8, 15, 22], [7, 14, 21, 28]),
    (32, 2, "middle_cycle", 15, 32, (), [1, 16], [15, 30]),
    (32, 3, "cycle", 10, 30, (8, 23), [0, 10, 20], [9, 19, 29]),
    (32, 3, "middle_cycle", 10, 32, (), [1, 11, 21], [10, 20, 30]),
    (32, 4, "cycle", 8, 32, (), [0, 8, 16, 24], [7, 15, 23, 31]),
    (32, 4, "middle_cycle", 7, 30, (8, 23), [1, 8, 15, 22], [7, 14, 21, 28]),
    (34, 4, "middle_cycle", 8, 34, (), [1, 9, 17, 25], [8, 16, 24, 32]),
]


@pytest.mark.parametrize("depth, n, sharing, shared, unrolled, dropped, first, last", DROPPING)
def test_official_groups_and_dropping(depth, n, sharing, shared, unrolled, dropped, first, last):
    layer_map = map_layers(depth, n, sharing, "stepwise", drop_layers=True)
    prelude = layer_map.prelude_layers
    assert layer_map.num_shared_layers == shared
    assert layer_map.unrolled_depth == unrolled
    assert layer_map.dropped == dropped
    assert layer_map.unrolled_positions(prelude) == first
    assert layer_map.unrolled_positions(prelude + shared - 1) == last


# depth, recursions, sharing, source layers of the shared layers
STEPWISE = [
    (32, 3, "middle_cycle", [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]),
    (32, 2, "middle_cycle", [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26, 28, 30]),
    (30, 2, "middle_cycle", [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26, 28]),
    (30, 4, "middle_cycle", [1, 6, 10, 14, 19, 24, 28]),
    (32, 4, "cycle", [0, 4, 9, 13, 18, 22, 27, 31]),
    (30, 3, "cycle", [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
    (30, 3, "middle_cycle", [1, 4, 8, 11, 15, 18, 21, 25, 28]),
    (32, 4, "middle_cycle", [1, 6, 11, 15, 20, 26, 30]),
]


@pytest.mark.parametrize("depth, n, sharing, expected", STEPWISE)
def test_stepwise(depth, n, sharing, expected):
    layer_map = map_layers(depth, n, sharing, "stepwise", drop_layers=True)
    unique = layer_map.prelude_layers
    shared = layer_map.sources[unique : unique + layer_map.num_shared_layers]
    assert [group[0] for group in shared] == expected


def test_lower_upper_and_average():
    def shared(sharing, init):
        layer_map = map_layers(8, 3, sharing, init)
        return [list(group) for group in layer_map.sources[1:-1]]

    assert shared("middle_cycle", "lower") == [[1], [2]]
    assert shared("middle_cycle", "upper") == [[5], [6]]
    assert shared("middle_cycle", "average") == [[1, 3, 5], [2, 4, 6]]
    assert shared("middle_sequence", "average") == [[1, 2, 3], [4, 5, 6]]
    cycle = map_layers(9, 3, "cycle", "upper")
    assert cycle.sources == ((6,), (7,), (8,))
    assert map_layers(9, 3, "sequence", "lower").sources == ((0,), (1,), (2,))


def test_random_is_a_sorted_sample_of_the_middle():
    picks = {map_layers(30, 2, "middle_cycle", "random", seed=seed).sources for seed in range(5)}
    assert len(picks) == 5
    for sources in picks:
        middle = [group[0] for group in sources[1:-1]]
        assert middle == sorted(set(middle)) and min(middle) >= 1 and max(middle) <= 28
        assert sources[0] == (0,) and sources[-1] == (29,)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_every_layer_keeps_its_place_without_dropping(init, sharing):
    for depth in range(6, 14):
        for n in (1, 2, 3, 4):
            for prelude, coda in ((None, None), (2, 1), (1, 3)):
                if depth - sum(u if u is not None else 1 for u in (prelude, coda)) < n:
                    continue
                layer_map = map_layers(depth, n, sharing, init, prelude_layers=prelude, coda_layers=coda)
                assert layer_map.unrolled_depth == depth
                assert layer_map.dropped == ()
                assert layer_map.extra_prelude + layer_map.extra_coda < n
                positions = [i for layer in range(len(layer_map.sources)) for i in layer_map.unrolled_positions(layer)]
                assert sorted(positions) == list(range(depth))
                first, last = layer_map.prelude_layers, depth - layer_map.coda_layers
                for layer, group in enumerate(layer_map.sources):
                    shared = first <= layer < first + layer_map.num_shared_layers
                    if shared:
                        assert all(first <= source < last for source in group)
                    else:
                        assert list(group) == layer_map.unrolled_positions(layer)
                    if init == "average" and shared:
                        assert list(group) == layer_map.unrolled_positions(layer)


def test_the_remainder_goes_to_the_ends_by_turns_the_coda_first():
    assert [place_remainder(r) for r in range(4)] == [(0, 0), (0, 1), (1, 1), (1, 2)]
    layer_map = map_layers(30, 3, "middle_cycle", "stepwise")
    assert (layer_map.prelude_layers, layer_map.num_shared_layers, layer_map.coda_layers) == (1, 9, 2)
    assert layer_map.sources[-2:] == ((28,), (29,))


def test_even_spread_is_round_linspace():
    for first in (0, 1, 2):
        for last in range(first, 60):
            for count in range(1, last - first + 2):
                expected = [round(float(x)) for x in numpy.linspace(first, last, count)]
                assert even_spread(first, last, count) == expected


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((4, 3, "middle_cycle", "stepwise"), "num_recursions"),
        ((4, 0, "cycle", "stepwise"), "num_recursions"),
        ((4, 2, "cycle", "svd"), "init"),
    ],
)
def test_refusals(arguments, named):
    with pytest.raises(ConversionError, match=f"`{named}`"):
        map_layers(*arguments)
