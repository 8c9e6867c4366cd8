"""What metrics of clips and of sets have in common: how they are saved, merged and told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kv.metrics.backbones.base import same_kind


class SavedMetric(Metric):
    """What every metric here has in common: it is saved, is nobody else's, and takes its networks.

    * ``state_dict`` holds its states and its recipe; one of another recipe is refused. Networks
      that it looks through are its submodules, so they move with it, and are not saved.
    * A ``MetricCollection`` takes two metrics for one where their states are alike after the first
      batch, as they are where that equals its target. These are never alike.
    * States and networks keep their dtype, whatever is asked of the metric or of what holds it
      (``half()``, ``to(torch.bfloat16)``, ``set_dtype``, a Trainer's ``precision``).
    """

    full_state_update = False
    is_differentiable = False

    name: str = ""
    recipe: str = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        number = torch.frombuffer(bytearray(uuid4().bytes), dtype=torch.int32).clone()
        self.add_state("identity", number, dist_reduce_fx=_last)
        self.register_load_state_dict_post_hook(_miss_nothing)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or several, as torchmetrics does.

        Args:
            val: What ``forward`` or ``compute`` said, or a list of that; ``compute()`` if None.
            ax: Axes of matplotlib; new ones if None.

        Returns:
            Figure and axes.
        """
        return self._plot(val, ax)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same recipe was given.

        Args:
            incoming_state: That metric, or its ``metric_state``.

        Raises:
            ValueError: The recipes differ.
        """
        if isinstance(incoming_state, SavedMetric):
            self._refuse_recipe(incoming_state.recipe)
        super().merge_state(incoming_state)
        self._filled()

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """States and recipe, without the networks."""
        found = super().state_dict(destination, prefix=prefix, keep_vars=keep_vars)
        for key in [key for key in found if key.startswith(self._networks(prefix))]:
            del found[key]
        return found

    def get_extra_state(self) -> dict[str, str]:
        """What ``state_dict`` holds beside the states."""
        return {"recipe": self.recipe}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Check what ``load_state_dict`` brings; a metric of another recipe is left empty."""
        try:
            self._refuse_recipe(state["recipe"])
        except ValueError:
            Metric.reset(self)  # all of it, whatever a subclass keeps
            raise
        self._filled()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> SavedMetric:
        return super()._apply(same_kind(fn), *args, **kwargs)

    def _networks(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}{name}." for name in self._modules)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._loaded_as = prefix
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _filled(self) -> None:
        """Clips came by another way than ``update``: no value is known, and no warning is due."""
        self._computed = None
        self._update_count += 1

    def _refuse_recipe(self, recipe: str) -> None:
        if recipe != self.recipe:
            raise ValueError(
                f"Clips of '{recipe}' cannot be counted by '{self.recipe}'. Make both metrics with "
                "the same arguments."
            )


def _last(numbers: Tensor) -> Tensor:
    return numbers[-1]  # of another metric and of this one, so it stays what it is


def _miss_nothing(metric: SavedMetric, keys: Any) -> None:
    """Networks are not saved, and a checkpoint from before a metric was added has nothing of it."""
    prefix = metric._loaded_as
    known = (*metric._networks(prefix), f"{prefix}_extra_state")
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(known)]
