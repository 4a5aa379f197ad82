"""Feature maps of linear attention: phi with kernel(q, k) = phi(q) . phi(k).

A factor that all kernels of a map share is left out of them: it cancels in the normalised output. Features lie before
tokens in memory, `(..., size, tokens)`, so that their products run along contiguous tokens.
"""

import torch

from ..configuration.config_basics import check_choice


class FeatureMap:
    """Base of all maps; a new one defines `size` and `expand`, and is added to `FEATURE_MAPS` to be used by name."""

    def size(self, feature_dim: int) -> int:
        """Number of features of a vector of `feature_dim` numbers."""
        raise NotImplementedError

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        """Queries or keys of shape `(..., tokens, feature_dim)` -> `(..., prepared_dim, tokens)`, contiguous."""
        return vectors.mT.contiguous()

    def expand(self, prepared: torch.Tensor) -> torch.Tensor:
        """`(..., prepared_dim, tokens)` -> phi, without `weights`, of shape `(..., size, tokens)`."""
        raise NotImplementedError

    def weights(self, feature_dim: int, like: torch.Tensor) -> torch.Tensor | None:
        """Factor on each feature in the sum over features, of shape `(size, 1)`; `None` for ones."""
        return None

    def kernel(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Kernels of prepared queries and keys, of shape `(..., query tokens, key tokens)`."""
        query, key = self.expand(query), self.expand(key)
        return query.mT @ key

    def expand_into(self, prepared: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """As `expand`, but may write into `buffer`, of the result's shape; outside of graphs."""
        return self.expand(prepared)

    def kernel_into(self, query: torch.Tensor, key: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """As `kernel`, but may write into `buffer`, of the result's shape; outside of graphs."""
        return self.kernel(query, key)


class TaylorMap(FeatureMap):
    """Twice 1 + s + s^2 / 2, s = q . k / sqrt(feature_dim) (paper, section 3.1), in its packed form.

    With a 1 in front of each vector, twice the kernel is (1 + s)^2 + 1. The square has only (d + 1)(d + 2) / 2
    different products, 153 for d = 16, where the full outer product has 273.
    """

    def size(self, feature_dim: int) -> int:
        return (feature_dim + 1) * (feature_dim + 2) // 2

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        scaled = vectors * vectors.shape[-1] ** -0.25
        return torch.cat([torch.ones_like(scaled[..., :1]), scaled], dim=-1).mT.contiguous()

    def expand(self, prepared: torch.Tensor) -> torch.Tensor:
        rows = range(prepared.shape[-2])
        return torch.cat([prepared[..., i : i + 1, :] * prepared[..., i:, :] for i in rows], dim=-2)

    def expand_into(self, prepared: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        rows, start = prepared.shape[-2], 0
        for i in range(rows):
            end = start + rows - i
            torch.mul(prepared[..., i : i + 1, :], prepared[..., i:, :], out=buffer[..., start:end, :])
            start = end
        return buffer

    def weights(self, feature_dim: int, like: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.triu_indices(feature_dim + 1, feature_dim + 1, device=like.device)
        weights = 2.0 - (rows == columns).to(like.dtype)
        # the 1 beside the square
        weights[0] += 1.0
        return weights[:, None]

    def kernel(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query.mT @ key).square() + 1.0

    def kernel_into(self, query: torch.Tensor, key: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return torch.matmul(query.mT, key, out=buffer).square_().add_(1.0)


class EluMap(FeatureMap):
    """elu(x) + 1 (Katharopoulos et al., 2020)."""

    def size(self, feature_dim: int) -> int:
        return feature_dim

    def expand(self, prepared: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.elu(prepared) + 1.0


class SoftmaxMap(FeatureMap):
    """softmax over the features, and over their negatives (Zhang et al., 2024)."""

    def size(self, feature_dim: int) -> int:
        return 2 * feature_dim

    def expand(self, prepared: torch.Tensor) -> torch.Tensor:
        return torch.cat([prepared.softmax(dim=-2), (-prepared).softmax(dim=-2)], dim=-2)


FEATURE_MAPS: dict[str, FeatureMap] = {"taylor": TaylorMap(), "elu": EluMap(), "softmax": SoftmaxMap()}


def find_feature_map(name: str | FeatureMap) -> FeatureMap:
    """A map by its name in `FEATURE_MAPS`, or the map itself."""
    if isinstance(name, FeatureMap):
        return name
    check_choice("feature_map", name, tuple(FEATURE_MAPS))
    return FEATURE_MAPS[name]


def in_graph(*tensors: torch.Tensor) -> bool:
    """Whether a gradient or a compiler follows, so that nothing may be written in place."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
