"""What metrics on features of frames have in common: which backbone they look through."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from lightning_kv.metrics.backbones import BACKBONES, Backbone, backbone
from lightning_kv.metrics.base import VideoMetric


class FeatureMetric(VideoMetric):
    """A metric of pixels that looks through a backbone; results are named ``METRIC/BACKBONE``.

    A subclass sets ``backbones``: the names that fit, the default first. A module of one's own
    fits always, and goes by its own name.

    Args:
        backbone: A name out of ``backbones``, or a module that maps frames ``[N, 3, H, W]`` in
            [0, 1] to features ``[N, d]``.
        given: Where the weights lie; by default they are looked for.
        accept: Licences accepted for weights that forbid commercial use.
        kwargs: What every torchmetrics metric takes.

    Raises:
        ValueError: The backbone does not fit.
        WeightsUnavailable: Its weights, a licence or a package is missing.
    """

    backbones: tuple[str, ...]
    through = "features"  # what the recipe calls it

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
        given: Path | str | None = None,
        accept: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone = self._fitting(
            self.backbones[0] if backbone is None else backbone, given, accept
        )
        self.name = f"{type(self).name}/{self.backbone.name}"
        self.recipe = f"{type(self).recipe}; {self.through}: {self.backbone.recipe}"

    @classmethod
    def _fitting(
        cls, name: str | nn.Module, given: Path | str | None, accept: Collection[str]
    ) -> Backbone:
        """The backbone, if it fits.

        Raises:
            ValueError: It does not.
        """
        if isinstance(name, str):
            head = name.partition("=")[0]
            if head in BACKBONES and head not in (*cls.backbones, "random-2dconv"):
                raise ValueError(
                    f"The metric '{cls.name}' is not defined on '{head}'. Choose one of "
                    f"{', '.join(cls.backbones)}, or pass a module."
                )
        found = backbone(name, given, accept)
        if not found.takes_frames:
            raise ValueError(
                f"The metric '{cls.name}' looks at frames, and '{found.name}' takes clips of "
                f"{found.clip_len}. Choose one of {', '.join(cls.backbones)}."
            )
        return found
