"""How pleasing frames are to look at, according to a model of people's ratings."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_kv.metrics.backbones.base import ask, in_float32
from lightning_kv.metrics.backbones.weights import load_state, locate, published, verified
from lightning_kv.metrics.features import FeatureMetric
from lightning_kv.metrics.functional.consistency import directions

HEAD = "laion-aesthetic"
PREDICTOR = "LAION aesthetic predictor v1"


class AestheticQuality(FeatureMetric):
    """The LAION aesthetic predictor v1 on every frame, as VBench uses it (arXiv 2311.17982).

    Args:
        backbone: As for every :class:`FeatureMetric`.
        head: A module that maps features of length one to ratings ``[N, 1]`` from 1 to 10, or the
            file of the published linear layer; by default that file is looked for.
        given: Where the weights of the backbone lie.
        accept: Licences accepted.
        kwargs: What every torchmetrics metric takes.

    Raises:
        ValueError: The backbone does not fit, or the head does not fit the backbone.
        WeightsUnavailable: Weights, a licence or a package is missing.

    Example:
        >>> import torch
        >>> colour = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> redness = nn.Linear(3, 1, bias=False)
        >>> _ = nn.init.constant_(redness.weight, 0).data[0, 0].fill_(10)
        >>> red, green = torch.eye(3)[:2].view(2, 3, 1, 1).expand(2, 3, 8, 8)
        >>> AestheticQuality(colour, redness).curve(torch.stack([red, green])).tolist()
        [1.0, 0.0]
    """

    name = "aesthetic_quality"
    unit = ""
    higher_is_better = True
    recipe = (
        f"mean over frames after the context of linear(feature of length one) / 10, {PREDICTOR}"
    )
    backbones = ("clip-vit-l14",)

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
        head: nn.Module | Path | str | None = None,
        given: Path | str | None = None,
        accept: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, given, accept, **kwargs)
        if isinstance(head, nn.Module):
            self.head, words = head, f"head {type(head).__name__} given by the user"
        else:
            self.head, sha256 = linear_head(head, self.backbone.num_features)
            words = f"{PREDICTOR} (SHA-256 {sha256[:8]})"
        self.head.eval().requires_grad_(False)
        self.recipe = self.recipe.replace(PREDICTOR, words)

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """Rating of every frame, a tenth of it."""
        features = directions(self.backbone.features(preds))
        return ask(self.head, self.head, features).double().squeeze(-1) / 10


def linear_head(path: Path | str | None, width: int) -> tuple[nn.Linear, str]:
    """The published linear layer, and the checksum of its file.

    Args:
        path: Its file; looked for if None.
        width: Of the features that it is to read.

    Raises:
        ValueError: The file is another one, or its layer reads features of another width.
        WeightsUnavailable: It is not on this machine.
    """
    file = locate(HEAD, path)
    sha256 = verified(file, published(HEAD))
    state = load_state(file)
    held = state if isinstance(state, dict) else {type(state).__name__: state}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in held.items()}
    if shapes != {"weight": (1, width), "bias": (1,)}:
        raise ValueError(
            f"{file} is not a linear layer for features of width {width}: it holds {shapes}. "
            f"Pass {published(HEAD).file} of {published(HEAD).page} and its backbone clip-vit-l14."
        )
    with in_float32():
        head = nn.Linear(width, 1)
    head.load_state_dict(state)
    return head, sha256
