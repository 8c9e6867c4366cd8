"""Muon in float32, and several optimisers that step as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Bring the singular values of matrices ``[n, r, c]`` near 1 (quintic Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024), RMS matched to AdamW.

    The scale ``0.2 sqrt(max(r, c))`` is that of Moonlight (arXiv 2502.16982).
    ``torch.optim.Muon`` orthogonalises in bfloat16, which processors without native bfloat16
    emulate: it took 0.5 s of a 1.25 s training step. This one runs in float32, matrices of a shape
    together.

    Args:
        params: Matrices.
        lr: Learning rate, on AdamW's scale.
        momentum: Of the Nesterov momentum.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                direction = orthogonalise(torch.stack([self._momentum(m, group) for m in matrices]))
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(direction.unbind()), alpha=-rate)
        return loss

    def _momentum(self, matrix: Tensor, group: dict) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
        return matrix.grad.lerp(buffer, group["momentum"]).float()


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimisers that step as one, so that automatic optimisation can drive them.

    Its groups are those of its parts one after the other, and so is its state: a schedule, gradient
    clipping and a checkpoint see one optimiser.

    Args:
        parts: Optimisers of different parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Let the parts work on the groups and the state that are held here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state that :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._link()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every part, after one call of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
