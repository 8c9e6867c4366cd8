"""LPIPS: how different frames look to a network that was taught by people's judgments."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_kv.metrics.backbones.lpips import TRUNKS, LPIPSNetwork, network
from lightning_kv.metrics.base import VideoMetric
from lightning_kv.metrics.functional.perceptual import lpips

__all__ = ["LPIPS", "TRUNKS"]


class LPIPS(VideoMetric):
    """Learned perceptual distance to the reference rollout (Zhang et al., arXiv 1801.03924).

    Results are named ``lpips/alex``, ``lpips/vgg`` or ``lpips/squeeze``. The trunk is looked for on
    this machine as all weights are, and never downloaded.

    Args:
        backbone: ``alex``, ``vgg`` or ``squeeze``.
        given: File of the trunk: torchvision's, as published.
        accept: Licences accepted; these trunks need none.
        trunk: torchvision's network of that kind instead of a file; or ``"random"``, which is
            named ``lpips/alex-random`` and means nothing.
        kwargs: What every torchmetrics metric takes.

    Raises:
        ValueError: There is no such network, or the trunk is another one.
        WeightsUnavailable: The trunk or a package is missing.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 64, 64)
        >>> metric = LPIPS("squeeze", trunk="random")
        >>> metric.update(black, black)
        >>> metric.name, metric.compute().item()
        ('lpips/squeeze-random', 0.0)
    """

    name = "lpips"
    unit = ""
    higher_is_better = False
    recipe = "against the reference: mean over frames after the context of LPIPS"
    paired = True
    plot_lower_bound = 0.0
    identical = 0.0
    backbones = tuple(TRUNKS)

    def __init__(
        self,
        backbone: str = "alex",
        given: Path | str | None = None,
        accept: Collection[str] = (),
        trunk: nn.Module | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (isinstance(trunk, str) and trunk != "random") or None not in (given, trunk):
            raise ValueError(
                f"The trunk of LPIPS is not clear: the file {given} and {trunk!r} were given. Pass "
                "a file as given, a module as trunk, or trunk='random'."
            )
        if trunk is None:
            self.backbone = network(backbone, given, accept)
        else:
            self.backbone = LPIPSNetwork(backbone, None if trunk == "random" else trunk)
        self.name = f"{type(self).name}/{self.backbone.name}"
        self.recipe = f"{type(self).recipe}; {self.backbone.recipe}"

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """Distance of every frame."""
        return lpips(preds, target, self.backbone)
