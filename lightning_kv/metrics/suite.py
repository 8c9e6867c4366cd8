"""Metrics by name: what there is, what was chosen, and what is missing for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lightning_kv.metrics.aesthetic import AestheticQuality
from lightning_kv.metrics.alignment import TextAlignment
from lightning_kv.metrics.backbones import BACKBONES, Backbone, WeightsUnavailable, backbone
from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.consistency import (
    BackgroundConsistency,
    FeatureSimilarity,
    LagCoherence,
    SubjectConsistency,
)
from lightning_kv.metrics.dynamics import DynamicDegree, FlowMagnitude, MotionSmoothness
from lightning_kv.metrics.fidelity import MSSSIM, PSNR, SSIM, IdenticalFrames, PSNRPooled
from lightning_kv.metrics.imaging import (
    Brightness,
    Colourfulness,
    Contrast,
    ImagingQuality,
    Saturation,
    Sharpness,
)
from lightning_kv.metrics.latents import (
    LatentCosine,
    LatentMSE,
    LatentRelative,
    LatentShift,
    LatentSNR,
)
from lightning_kv.metrics.mechanism import AttentionError, RetainedMass
from lightning_kv.metrics.motion import FrameChange, TemporalFlicker
from lightning_kv.metrics.panorama import CameraRule, Recall, RecallFar, RevisitError, RulerError
from lightning_kv.metrics.perceptual import LPIPS
from lightning_kv.metrics.set_base import windows_recipe
from lightning_kv.metrics.sets import FrechetVideoDistance, SetMetric, VideoKernelDistance
from lightning_kv.metrics.windows import FRAMES

METRICS: dict[str, type[ClipMetric]] = {
    metric.name: metric
    for metric in (
        PSNR,
        SSIM,
        LatentMSE,
        RevisitError,
        Recall,
        RecallFar,
        RulerError,
        CameraRule,
        PSNRPooled,
        IdenticalFrames,
        MSSSIM,
        LPIPS,
        FeatureSimilarity,
        LatentRelative,
        LatentCosine,
        LatentSNR,
        LatentShift,
        RetainedMass,
        AttentionError,
        SubjectConsistency,
        BackgroundConsistency,
        LagCoherence,
        TemporalFlicker,
        FrameChange,
        MotionSmoothness,
        DynamicDegree,
        FlowMagnitude,
        Sharpness,
        Brightness,
        Contrast,
        Colourfulness,
        Saturation,
        ImagingQuality,
        AestheticQuality,
        TextAlignment,
    )
}
"""Every metric of a clip, by its name."""

SETS: dict[str, type[SetMetric]] = {"fvd": FrechetVideoDistance, "kvd": VideoKernelDistance}
SETS |= dict.fromkeys(("jedi", "jedi-u"), VideoKernelDistance)
"""Every metric of two sets of clips, by its name."""

ENCODERS = {
    "fvd": ("i3d", "i3d-torchscript", "videomae-ssv2", "panorama-encoder"),
    "kvd": ("i3d", "i3d-torchscript", "videomae-ssv2", "panorama-encoder"),
    "jedi": ("panorama-encoder", "videomae-ssv2"),
    "jedi-u": ("panorama-encoder", "videomae-ssv2"),
}
"""Encoders that a metric of sets is known on, the default first; any other may be named."""

USUAL = (
    *("psnr", "ssim", "latent_mse", "revisit_error", "recall", "recall_far", "ruler_error"),
    *("camera_rule", "temporal_flicker", "sharpness"),
)
"""What is measured where nobody says: everything that needs no weights and tells policies apart."""


@dataclass(frozen=True)
class Choice:
    """A metric as somebody wrote it: ``psnr``, ``fvd/panorama-encoder``, ``lpips/alex=FILE``.

    Args:
        base: Name of the metric without its network.
        network: What it looks through; None where it needs nothing.
        given: Path of the network's weights; None to look for them.
    """

    base: str
    network: str | None = None
    given: str | None = None

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read a name.

        Raises:
            ValueError: There is no such metric, or it looks through no network, or not this one.

        Example:
            >>> Choice.parse("lpips/vgg=vgg16.pth")
            Choice(base='lpips', network='vgg', given='vgg16.pth')
            >>> Choice.parse("fvd").name
            'fvd/i3d'
        """
        name, _, given = text.partition("=")
        base, _, network = name.partition("/")
        known = [*METRICS, *SETS]
        if base not in known:
            nearest = get_close_matches(base, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"There is no metric '{text}'. Did you mean '{nearest}'? There are: "
                f"{', '.join(known)}."
            )
        fitting = networks(base)
        if (network or given) and not fitting:
            raise ValueError(f"The metric '{base}' needs no network, but '{text}' names one.")
        allowed = {*fitting, *BACKBONES} if base in SETS else {*fitting}
        if network and network not in allowed:
            raise ValueError(
                f"The metric '{base}' is not defined on '{network}'. Write one of "
                f"{', '.join(f'{base}/{each}' for each in fitting)}."
            )
        return cls(base, network or (fitting[0] if fitting else None), given or None)

    @property
    def name(self) -> str:
        """As in results."""
        return self.base if self.network is None else f"{self.base}/{self.network}"

    @property
    def of_sets(self) -> bool:
        """Whether it compares sets of clips."""
        return self.base in SETS

    @property
    def needs(self) -> frozenset[str]:
        """Fields of a clip without which it has no value at all."""
        return frozenset(("pixels",) if self.of_sets else METRICS[self.base].needs)

    def metric(self, accept: Collection[str] = ()) -> ClipMetric:
        """A fresh metric of clips.

        Raises:
            WeightsUnavailable: The network's weights are not here.
        """
        if self.network is None:
            return METRICS[self.base]()
        return METRICS[self.base](self.network, given=self.given, accept=accept)

    def encoder(self, accept: Collection[str] = ()) -> Backbone:
        """What a metric of sets looks through.

        Raises:
            WeightsUnavailable: Its weights are not here.
        """
        return backbone(self.network, self.given, accept)


def metric_by_name(names: Iterable[str], accept: Collection[str] = ()) -> dict[str, ClipMetric]:
    """A fresh metric of clips for each name, in the order given.

    Raises:
        ValueError: A name is unknown, or is a metric of sets.
        WeightsUnavailable: A network's weights are not here.

    Example:
        >>> {name: metric.unit for name, metric in metric_by_name(["psnr", "recall"]).items()}
        {'psnr': 'dB', 'recall': 'share'}
    """
    choices = [Choice.parse(name) for name in names]
    if sets := [choice.name for choice in choices if choice.of_sets]:
        raise ValueError(
            f"{', '.join(sets)} compares sets of clips and has no value for one. Use "
            "lightning_kv.metrics.suite.set_metric for it."
        )
    return {choice.name: choice.metric(accept) for choice in choices}


def networks(base: str) -> tuple[str, ...]:
    """Networks that a metric is known on, the default first; none where it needs none."""
    return ENCODERS[base] if base in SETS else getattr(METRICS[base], "backbones", ())


def set_metric(name: str, encoder: Backbone | None = None, **given: Any) -> SetMetric:
    """The metric of sets of this name, on an encoder or on features that it made.

    Args:
        name: Such as ``fvd/panorama-encoder``.
        encoder: What the windows of clips are shown to; None where ``num_features`` and the like
            are ``given``.
        given: Of :class:`lightning_kv.metrics.sets.SetMetric`.
    """
    base = Choice.parse(name).base
    form = {"form": base} if SETS[base] is VideoKernelDistance else {}
    if encoder is not None:
        given = {"features_recipe": windows_recipe(encoder)} | given
    return SETS[base](encoder, **form, **given)


class Suite:
    """The metrics of a run.

    Args:
        names: What was asked for; ``USUAL`` where None.
        known: Fields of a clip that the run has; what needs others is refused, or left out of
            the usual ones.
        accept: Licences accepted for weights that forbid commercial use.

    Raises:
        ValueError: No name is given, one is unknown or comes twice, or needs what the run has not.

    Attributes:
        choices: By name, in order.
        made: What is available: a metric of clips, or the encoder of a metric of sets, by name.
        missing: Why a metric is unavailable, by name.
    """

    def __init__(
        self, names: Sequence[str] | None, known: Collection[str], accept: Collection[str] = ()
    ) -> None:
        if names is not None and not names:
            raise ValueError(
                "No metric is named: 0 were given. Name one or more, such as --metrics "
                "[psnr,recall], or leave them out for the usual ones."
            )
        self.accept = accept
        chosen = [Choice.parse(name) for name in (USUAL if names is None else names)]
        if names is None:
            chosen = [choice for choice in chosen if choice.needs <= set(known)]
        for choice in chosen:
            if lacking := sorted(choice.needs - set(known)):
                raise ValueError(
                    f"The metric '{choice.name}' cannot be computed here: it needs "
                    f"{' and '.join(map(explained, lacking))}. Those that can: "
                    f"{', '.join(able(known))}."
                )
        self.choices = {choice.name: choice for choice in chosen}
        if len(self.choices) < len(chosen):
            raise ValueError(
                f"A metric is named twice: {', '.join(choice.name for choice in chosen)}. Name "
                "each once."
            )
        self.made: dict[str, ClipMetric | Backbone] = {}  # holds the networks, so they are shared
        self.missing: dict[str, str] = {}
        for name, choice in self.choices.items():
            try:
                self.made[name] = (choice.encoder if choice.of_sets else choice.metric)(accept)
            except WeightsUnavailable as error:
                self.missing[name] = str(error)

    def clip_metrics(self) -> dict[str, ClipMetric]:
        """Fresh metrics of clips, those that are available; networks are shared."""
        return {
            name: choice.metric(self.accept)
            for name, choice in self.choices.items()
            if not choice.of_sets and name in self.made
        }

    def encoders(self) -> dict[str, Backbone]:
        """What the available metrics of sets look through, each once, by its name."""
        found = (made for name, made in self.made.items() if self.choices[name].of_sets)
        return {encoder.name: encoder for encoder in found}

    def facts(self) -> dict[str, dict[str, Any]]:
        """Unit, direction, recipe and kind of every metric, available or not."""
        return {name: self._facts(name, choice) for name, choice in self.choices.items()}

    def recipes(self) -> dict[str, str]:
        """Recipe of every metric and checksum of its weights, or why it is unavailable."""
        return {
            name: f"{each['recipe'] or each['undefined']} {each.get('weights') or ''}".rstrip()
            for name, each in self.facts().items()
        }

    def _facts(self, name: str, choice: Choice) -> dict[str, Any]:
        kind = SETS[choice.base] if choice.of_sets else METRICS[choice.base]
        facts = {"unit": kind.unit, "higher_is_better": kind.higher_is_better}
        facts["sets"] = choice.of_sets
        facts["against_reference"] = not choice.of_sets and kind.against_reference()
        if name in self.missing:
            return facts | {"recipe": "", "undefined": f"unavailable: {self.missing[name]}"}
        made = self.made[name]
        if choice.of_sets:
            frames = made.clip_len or FRAMES
            return facts | {
                "recipe": set_metric(name, made, frames=frames).recipe,
                "undefined": "there is nothing to compare with",
                "encoder": made.name,
                "frames": frames,
                **_network(made),
            }
        against = facts["against_reference"]
        return facts | {
            "recipe": made.recipe,
            "undefined": "this is the reference itself" if against else made.undefined,
            "identical": made.identical,
            **_network(getattr(made, "backbone", None)),
        }


def _network(backbone: Any) -> dict[str, Any]:
    if backbone is None:
        return {}
    return {"comparable": backbone.comparable, "weights": backbone.weights_sha256}


def able(known: Collection[str]) -> list[str]:
    """Metrics that can be computed from these fields of a clip, weights aside."""
    names = [*METRICS, *SETS]
    return [name for name in names if Choice.parse(name).needs <= set(known)]


def explained(need: str) -> str:
    """What a field of a clip is, in words."""
    return {
        "reference_pixels": "pixels of a reference",
        "reference_latents": "latents of a reference",
        "scene": "the panorama world",
        "attention": "a rollout",
        "fps": "a frame rate",
        "prompt": "a prompt for every clip",
    }.get(need, need)
