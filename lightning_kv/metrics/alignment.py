"""How well frames show what the prompt says."""

from __future__ import annotations

from torch import Tensor

from lightning_kv.metrics.backbones.base import ask
from lightning_kv.metrics.base import Reader
from lightning_kv.metrics.features import FeatureMetric
from lightning_kv.metrics.functional.consistency import cosine, directions


class TextAlignment(FeatureMetric):
    """Cosine of every frame with the prompt, in the space of CLIP (arXiv 2103.00020).

    The plain cosine: neither scaled nor cut off at 0. A module of one's own needs
    ``text_features(texts) -> [N, d]`` beside its features of frames.

    Example:
        >>> import torch
        >>> from lightning_kv.metrics.backbones import Backbone
        >>> class Colour(Backbone):
        ...     name, num_features, recipe = "colour", 3, "mean colour"
        ...
        ...     def forward(self, frames):
        ...         return frames.mean((2, 3))
        ...
        ...     def text_features(self, texts):
        ...         return torch.eye(3)[["red green blue".split().index(text) for text in texts]]
        >>> red, green = torch.eye(3)[:2].view(2, 3, 1, 1).expand(2, 3, 8, 8)
        >>> metric = TextAlignment(Colour())
        >>> metric.update(torch.stack([red, green])[None], prompts=["red"])
        >>> metric.compute().item()
        0.5
        >>> metric.curve(torch.stack([red, green]), prompt="red").tolist()
        [1.0, 0.0]
    """

    name = "text_alignment"
    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of cos(frame, prompt), not scaled; the prompt is cut "
        "after 77 tokens by CLIP"
    )
    needs = ("pixels", "prompt")
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    backbones = ("clip-vit-b32", "clip-vit-l14")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Cosine of every frame with the prompt.

        Raises:
            ValueError: There is no prompt, or the backbone reads no text.
        """
        if prompt is None:
            raise ValueError(
                f"The metric '{self.name}' compares frames with the prompt, and there is none. "
                "Pass update(preds, prompts=[...]), or leave the metric out."
            )
        encode = getattr(self.backbone, "text_features", None)
        if encode is None:
            raise ValueError(
                f"The backbone '{self.backbone.name}' reads no text. Choose one of "
                f"{', '.join(self.backbones)}, or give the module a method text_features."
            )
        wanted = directions(ask(self.backbone, encode, [prompt]))[0]

        def read(pixels: Tensor, reference: Tensor | None) -> Tensor:
            return cosine(directions(self.backbone.features(pixels)), wanted)

        return read
