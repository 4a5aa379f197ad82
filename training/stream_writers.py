"""Solves for the matrices that write to the stream: what recursions share, and the low-rank part that each adds.

Both are linear in what the matrix reads, so that the best ones are known without a gradient: the shared matrix by
ridge regression over all applications, the part of a recursion by reduced-rank regression of what the shared matrix
leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .source_streams import Layer, residual_factor


_CHUNK = 4096  # tokens that are summed in fp32, before the sums are added in fp64
_ROUNDS = 4  # of shared matrix and differences, each given the other


@dataclass(frozen=True)
class Application:
    """What a linear layer reads at one place, and where it has to bring the stream; of several batches.

    Attributes:
        features: what it reads, of shape `(batch, seq_len, in_features)`.
        entering: states before it, of shape `(batch, seq_len, hidden_size)`.
        wanted: states of the source behind it, of the same shape.
    """

    features: list[torch.Tensor]
    entering: list[torch.Tensor]
    wanted: list[torch.Tensor]


class StreamWriter:
    """A linear layer that writes to the stream, with what each recursion adds to it.

    Args:
        layer: decoder layer.
        part: its attention or MLP.
        name: of the linear layer in the part.
    """

    def __init__(self, layer: Layer, part: Any, name: str):
        self.factor = residual_factor(layer)
        self.linear: nn.Linear = getattr(part, name)
        self.name = name
        self.adapter: Any = getattr(part, "recursion_adapter", None)

    def solve(self, applications: list[Application], ridge: float) -> list[list[torch.Tensor]]:
        """Sets the matrix, and what each recursion adds to it, for all applications at once.

        Args:
            applications: one of each recursion.
            ridge: draws the matrix to what it was, and differences to 0, relative to the mean square of the features.

        Returns:
            The states behind each application.
        """
        equations = [_Equations(self, one) for one in applications]
        shared = _Ridge(torch.stack([one.square for one in equations]).sum(0), ridge)
        prior = shared.penalty * self.linear.weight.double().T
        alone = [] if self.adapter is None else [_Ridge(one.square, ridge) for one in equations]
        for _ in range(_ROUNDS if alone else 1):
            rests = [one.left_by(self._difference(recursion)) for recursion, one in enumerate(equations)]
            self.linear.weight.copy_(shared.solve(torch.stack(rests).sum(0) + prior).T)
            for recursion, own in enumerate(alone):
                self._set_difference(recursion, own, equations[recursion].left_by(self.linear.weight))
        return [self._states_behind(recursion, one) for recursion, one in enumerate(applications)]

    def solve_difference(self, recursion: int, application: Application, ridge: float) -> list[torch.Tensor]:
        """Sets what one recursion adds to the matrix, if it adds anything.

        Returns:
            The states behind this application.
        """
        if self.adapter is not None:
            equations = _Equations(self, application)
            rest = equations.left_by(self.linear.weight)
            self._set_difference(recursion, _Ridge(equations.square, ridge), rest)
        return self._states_behind(recursion, application)

    def _states_behind(self, recursion: int, application: Application) -> list[torch.Tensor]:
        states = []
        for reads, here in zip(application.features, application.entering, strict=True):
            moved = self.linear(reads)
            if self.adapter is not None:
                moved = moved + self.adapter(reads, self.name, recursion)
            states.append(here + self.factor * moved)
        return states

    def _factors(self, recursion: int) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = (getattr(self.adapter, f"{self.name}_{factor}") for factor in ("down", "up"))
        return down[recursion], up[recursion]

    def _difference(self, recursion: int) -> torch.Tensor | None:
        """Of the weight's shape; `None` where recursions add nothing."""
        if self.adapter is None:
            return None
        down, up = self._factors(recursion)
        return up.double() @ down.double()

    def _set_difference(self, recursion: int, ridge: _Ridge, rest: torch.Tensor) -> None:
        """The weights of the adapter's rank that come nearest to what is left, `rest`."""
        best = ridge.solve(rest)
        # they lie in the directions in which the best weights of all ranks write most
        directions = torch.linalg.eigh(best.T @ rest).eigenvectors
        down, up = self._factors(recursion)
        directions = directions[:, -len(down) :]
        read = (best @ directions).T
        # steps of one size move both factors alike
        balance = read.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt()
        down.copy_(read / balance)
        up.copy_(directions * balance.T)


class _Equations:
    """`square @ weight.T = product` of one application, in fp64: the weights that solve it are the best.

    Tokens count by the inverse of their size, since a few states are hundreds of times larger than all others.
    """

    def __init__(self, writer: StreamWriter, application: Application):
        linear = writer.linear
        self.square = linear.weight.new_zeros(linear.in_features, linear.in_features, dtype=torch.float64)
        self.product = self.square.new_zeros(linear.in_features, linear.out_features)
        batches = zip(application.features, application.entering, application.wanted, strict=True)
        for reads, here, there in batches:
            size = there.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            moved = (there - here) / writer.factor
            if linear.bias is not None:
                moved = moved - linear.bias
            x, y = (reads * size).flatten(0, -2), (moved * size).flatten(0, -2)
            for x_part, y_part in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
                self.square += (x_part.T @ x_part).double()
                self.product += (x_part.T @ y_part).double()

    def left_by(self, weight: torch.Tensor | None) -> torch.Tensor:
        """The product that remains when `weight`, of shape `(out_features, in_features)`, writes already."""
        return self.product if weight is None else self.product - self.square @ weight.double().T


class _Ridge:
    """Solves `(square + penalty) @ x = product`; the penalty is relative to the mean of the diagonal."""

    def __init__(self, square: torch.Tensor, ridge: float):
        self.penalty = ridge * square.diagonal().mean().clamp(min=1e-12)
        self._factors = torch.linalg.lu_factor(square + self.penalty * torch.eye(len(square)).to(square))

    def solve(self, product: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lu_solve(*self._factors, product)
