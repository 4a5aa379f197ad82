"""Numbers of parameters and of floating-point operations, by part."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ParameterCount:
    """Unique parameters; each shared layer and each tied matrix counts once.

    Attributes:
        embedding: input embedding.
        head: language-model head, 0 when tied to the embedding.
        layers: decoder layers.
        final_norm: norm before the head.
        routers: routers, with the predictors of `inference_rule="predictor"`.
        recursions: what the recursions of a MoR have of their own: low-rank differences, and norms beyond the first.
    """

    embedding: int
    head: int
    layers: int
    final_norm: int
    routers: int
    recursions: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def non_embedding(self) -> int:
        """Everything but the embedding and the head: the size that the MoR paper's Table 6 quotes."""
        return self.layers + self.final_norm + self.routers + self.recursions


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward call, by part.

    Attributes:
        projections: query, key, value and output projections.
        attention: queries times keys, and weights times values.
        mlp: the matrices of the MLP, with the one that chooses experts.
        routers: routers, and predictors with them.
        head: language-model head.
        recursions: low-rank differences of the recursions of a MoR.
        linear_attention: of JRT-RNN: prefix linear attention, between its projections.
        conv: of JRT-RNN: taps of the short convolutions.
    """

    projections: float = 0
    attention: float = 0
    mlp: float = 0
    routers: float = 0
    head: float = 0
    recursions: float = 0
    linear_attention: float = 0
    conv: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))
