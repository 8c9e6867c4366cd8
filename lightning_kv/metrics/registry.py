"""Metrics by name: what there is, and how a name, an address or a metric becomes one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torchmetrics import Metric, MetricCollection

from lightning_kv.metrics.aesthetic import AestheticQuality
from lightning_kv.metrics.alignment import TextAlignment
from lightning_kv.metrics.backbones import BACKBONES, Backbone, backbone
from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.consistency import (
    BackgroundConsistency,
    FeatureSimilarity,
    LagCoherence,
    SubjectConsistency,
)
from lightning_kv.metrics.dynamics import DynamicDegree, FlowMagnitude, MotionSmoothness
from lightning_kv.metrics.fidelity import MSSSIM, PSNR, SSIM, IdenticalFrames, PSNRMean
from lightning_kv.metrics.imaging import (
    Brightness,
    Colourfulness,
    Contrast,
    ImagingQuality,
    Saturation,
    Sharpness,
)
from lightning_kv.metrics.latents import (
    DivergenceOnset,
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
from lightning_kv.metrics.plugins import imported, usable
from lightning_kv.metrics.sets import FrechetVideoDistance, JEDi, SetMetric, VideoKernelDistance
from lightning_kv.utilities.nearest import unknown

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
        PSNRMean,
        IdenticalFrames,
        MSSSIM,
        LPIPS,
        FeatureSimilarity,
        LatentRelative,
        LatentCosine,
        LatentSNR,
        LatentShift,
        DivergenceOnset,
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
SETS |= dict.fromkeys(("jedi", "jedi-u"), JEDi)
"""Every metric of two sets of clips, by its name."""

OWN: dict[str, type[ClipMetric] | type[SetMetric] | SetMetric] = {}
"""Metrics of other packages by their name, and those of sets that a :class:`Suite` was given."""

NAME = re.compile(r"[\w-]+")

RESERVED = frozenset(dir(MetricCollection([])))
"""What no metric can be called, as a collection has it by its own names for another thing."""

ENCODERS = {
    "fvd": ("i3d", "i3d-torchscript", "videomae-ssv2", "panorama-encoder"),
    "kvd": ("i3d", "i3d-torchscript", "videomae-ssv2", "panorama-encoder"),
    "jedi": ("panorama-encoder", "videomae-ssv2"),
    "jedi-u": ("panorama-encoder", "videomae-ssv2"),
}
"""Encoders that a metric of sets is known on, the default first; any other may be named."""


@dataclass(frozen=True)
class Choice:
    """A metric as somebody wrote it: ``psnr``, ``fvd/panorama-encoder``, ``lpips/alex=FILE``.

    Args:
        base: Name of the metric without its network.
        network: What it looks through; None where it needs nothing.
        given: Path of the network's weights; None to look for them.
        own: The metric itself, where somebody gave one, or its class in another package.
    """

    base: str
    network: str | None = None
    given: str | None = None
    own: ClipMetric | SetMetric | type[ClipMetric] | type[SetMetric] | None = field(
        default=None, compare=False
    )

    @classmethod
    def parse(cls, text: str | Metric | type[Metric]) -> Choice:
        """Read a name, or the address ``package.module:Class`` of a metric of another package.

        Args:
            text: Name or address; or a metric, which goes by its own name, or its class.

        Raises:
            ValueError: There is no such metric, or it looks through no network, or not this one;
                or an address cannot be imported; or it is no metric, or its name is no good.

        Example:
            >>> Choice.parse("lpips/vgg=vgg16.pth").network
            'vgg'
            >>> Choice.parse("fvd").name
            'fvd/i3d'
        """
        if isinstance(text, ClipMetric | SetMetric):
            return cls(_full_name(text), own=text)
        if not isinstance(text, str):
            kind = usable(text)
            name = _free(kind)
            ours = kind in (METRICS.get(name), SETS.get(name))
            return cls.parse(name) if ours else cls(name, own=kind)
        if ":" in text.partition("=")[0]:
            kind = imported(text)
            return cls(_free(kind), own=kind)
        name, _, given = text.partition("=")
        base, _, network = name.partition("/")
        if isinstance(OWN.get(name), type) and not given:
            return cls(name, own=OWN[name])
        if base not in METRICS | SETS:
            raise ValueError(
                f"{unknown('metric', base, METRICS | SETS)} One of your own is given as "
                "package.module:Class."
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
    def kind(self) -> type[ClipMetric] | type[SetMetric]:
        """Its class."""
        if self.own is not None:
            return self.own if isinstance(self.own, type) else type(self.own)
        return SETS.get(self.base) or METRICS[self.base]

    @property
    def of_sets(self) -> bool:
        """Whether it compares sets of clips."""
        return issubclass(self.kind, SetMetric)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of a clip without which it has no value at all."""
        return frozenset(("pixels",) if self.of_sets else self.kind.needs)

    def metric(self, accept: Collection[str] = ()) -> ClipMetric:
        """A fresh metric of clips.

        Raises:
            ValueError: It is one of another package, and cannot be made without arguments.
            WeightsUnavailable: The network's weights are not here.
        """
        if self.own is not None:
            return _fresh(self.own)
        if self.network is None:
            return METRICS[self.base]()
        return METRICS[self.base](self.network, given=self.given, accept=accept)

    def encoder(self, accept: Collection[str] = ()) -> Backbone:
        """What a metric of sets looks through.

        Raises:
            ValueError: It looks through nothing.
            WeightsUnavailable: Its weights are not here.
        """
        if self.own is None:
            return backbone(self.network, self.given, accept)
        found = _fresh(self.own).backbone
        if found is None:
            raise ValueError(
                f"The metric '{self.name}' has no backbone, so it cannot look at videos. Make it "
                "with one."
            )
        return found


def _full_name(metric: ClipMetric | SetMetric) -> str:
    """Name of a metric in results; one of sets goes by that of its backbone too.

    Raises:
        ValueError: It is one of another package, and the name is another metric's.
    """
    _free(type(metric))
    if isinstance(metric, ClipMetric):
        return _key(metric.name, type(metric))
    _key(metric.features_name, type(metric), "the features of ")  # for its encoder has one too
    name = f"{metric.name}/{metric.features_name}"
    OWN[name] = metric
    return name


def _key(name: str, kind: type, of: str = "") -> str:
    """A name, if a collection of metrics can have it for a key.

    Raises:
        ValueError: It is an attribute of every collection, or has a dot.
    """
    if "." in name or name in RESERVED:
        why = "has a dot" if "." in name else "is one of what every MetricCollection has"
        raise ValueError(
            f"The name of a metric is its key in collections, and that of {of}{_where(kind)}, "
            f"{name!r}, {why}. Give {'them' if of else 'it'} another `name`, such as "
            f"'my_{name.replace('.', '_')}'."
        )
    return name


def _where(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _free(kind: type[ClipMetric] | type[SetMetric]) -> str:
    """Name of a metric's class, if it is no other's.

    Raises:
        ValueError: It is, or no word, or a collection cannot have it for a key.
    """
    ours = {**METRICS, **SETS}
    taken = ours.get(kind.name) or OWN.get(kind.name)
    if kind in ours.values() or taken is kind:
        return kind.name
    where = _where(kind)
    if taken is not None and where != _where(taken):
        raise ValueError(
            f"The name of a metric is taken: {where} is called '{kind.name}', and so is "
            f"{_where(taken)}. Give it another `name`."
        )
    if not NAME.fullmatch(kind.name):
        raise ValueError(
            f"The name of a metric is its key in results, and that of {where} is {kind.name!r}. "
            "Give it a `name` of letters, digits, '_' and '-'."
        )
    _key(kind.name, kind)
    OWN[kind.name] = kind
    return kind.name


def _fresh(own: Any) -> Any:
    """A metric of another package without clips.

    Raises:
        ValueError: It cannot be made without arguments.
    """
    if not isinstance(own, type):
        fresh = own.clone()
        Metric.reset(fresh)
        return fresh
    try:
        return own()
    except TypeError as error:
        raise ValueError(
            f"The metric {own.__module__}:{own.__qualname__} cannot be made without arguments: "
            f"{error}. Give all of them defaults."
        ) from error


def networks(base: str) -> tuple[str, ...]:
    """Networks that a metric is known on, the default first; none where it needs none."""
    return ENCODERS[base] if base in SETS else getattr(METRICS[base], "backbones", ())


def set_metric(
    name: str, encoder: Backbone | None = None, own: bool = True, **given: Any
) -> SetMetric:
    """The metric of sets of this name, on an encoder or on features that it made.

    Args:
        name: Such as ``fvd/panorama-encoder``; or that of one of another package which was chosen.
        encoder: What the windows of clips are shown to; None where ``num_features`` and the like
            are ``given``.
        own: Whether one of this name that was given as an object goes before ours.
        given: Of :class:`lightning_kv.metrics.sets.SetMetric`.
    """
    if own and name in OWN:
        return _fresh(OWN[name]).looking(encoder, **given)
    base = Choice.parse(name).base
    form = {"form": base} if issubclass(SETS[base], VideoKernelDistance) else {}
    return SETS[base](encoder, **form, **given)
