"""Metrics by name: what there is, what was chosen, and what is missing for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torchmetrics import Metric

from lightning_kv.metrics.backbones import Backbone, WeightsUnavailable
from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.plugins import in_a_list, source
from lightning_kv.metrics.registry import ENCODERS, METRICS, OWN, SETS, Choice, networks, set_metric
from lightning_kv.metrics.sets import SetMetric
from lightning_kv.metrics.windows import WindowEncoder
from lightning_kv.stats.vbench import METRICS as VBENCH_METRICS

__all__ = [
    "ENCODERS",
    "METRICS",
    "OWN",
    "SETS",
    "USUAL",
    "Choice",
    "Suite",
    "able",
    "explained",
    "metric_by_name",
    "networks",
    "set_metric",
]

VBENCH = "vbench_quality"
"""Name of VBench's quality score, which is derived from the values of seven metrics."""

USUAL = (
    *("psnr", "ssim", "latent_mse", "revisit_error", "recall", "recall_far", "ruler_error"),
    *("camera_rule", "temporal_flicker", "sharpness"),
)
"""What is measured where nobody says: everything that needs no weights and tells policies apart."""


def metric_by_name(names: Iterable[str], accept: Collection[str] = ()) -> dict[str, ClipMetric]:
    """A fresh metric of clips for each name or address, in the order given.

    Raises:
        ValueError: A name is unknown, or is a metric of sets.
        WeightsUnavailable: A network's weights are not here.

    Example:
        >>> {name: metric.unit for name, metric in metric_by_name(["psnr", "recall"]).items()}
        {'psnr': 'dB', 'recall': 'share'}
    """
    choices = [Choice.parse(name) for name in in_a_list(names)]
    if sets := [choice.name for choice in choices if choice.of_sets]:
        raise ValueError(
            f"{', '.join(sets)} compares sets of clips and has no value for one. Use "
            "lightning_kv.metrics.suite.set_metric for it."
        )
    return {choice.name: choice.metric(accept) for choice in choices}


class Suite:
    """The metrics of a run.

    Args:
        names: What was asked for, a list of names, addresses ``package.module:Class``, metrics or
            their classes; or names with commas between. ``USUAL`` where None.
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
        self,
        names: Sequence[str | Metric | type[Metric]] | str | None,
        known: Collection[str],
        accept: Collection[str] = (),
    ) -> None:
        names = None if names is None else in_a_list(names)
        if names is not None and not names:
            raise ValueError(
                "No metric is named: 0 were given. Name one or more, such as --metrics "
                "[psnr,recall], or leave them out for the usual ones."
            )
        self.accept = accept
        chosen = [Choice.parse(name) for name in (USUAL if names is None else whole(names))]
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
        for choice in chosen:
            if choice.own is None:
                OWN.pop(choice.name, None)  # one of that name was given to another suite
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
        self._encoders = {name: metric.encoder for name, metric in self.set_metrics().items()}

    def clip_metrics(self) -> dict[str, ClipMetric]:
        """Fresh metrics of clips, those that are available; networks are shared."""
        return {
            name: choice.metric(self.accept)
            for name, choice in self.choices.items()
            if not choice.of_sets and name in self.made
        }

    def set_metrics(self) -> dict[str, SetMetric]:
        """Fresh metrics of sets, those that are available; networks are shared."""
        return {
            name: set_metric(name, self.made[name])
            for name, choice in self.choices.items()
            if choice.of_sets and name in self.made
        }

    def encoder_of(self, name: str) -> str:
        """Name of what an available metric of sets looks through, which features go by."""
        return self._encoders[name].name

    def encoders(self) -> dict[str, WindowEncoder]:
        """What the available metrics of sets look through, each once, by its name."""
        return {encoder.name: encoder for encoder in self._encoders.values()}

    def facts(self) -> dict[str, dict[str, Any]]:
        """Unit, direction, recipe and kind of every metric, available or not."""
        return {name: self._facts(name, choice) for name, choice in self.choices.items()}

    def recipes(self) -> dict[str, str]:
        """Recipe of every metric and checksum of its weights, or why it is unavailable.

        Of a metric of another package also the checksum of its source, and of an object its
        settings: edited, it is another one.
        """
        return {
            name: " ".join(
                filter(
                    None,
                    (
                        each["recipe"] or each["undefined"],
                        each.get("weights"),
                        source(self.choices[name].kind),
                        settings_of(self.choices[name].own),
                    ),
                )
            )
            for name, each in self.facts().items()
        }

    def _facts(self, name: str, choice: Choice) -> dict[str, Any]:
        kind = choice.kind
        facts = {"unit": kind.unit, "higher_is_better": kind.higher_is_better}
        facts["bounds"] = [kind.plot_lower_bound, kind.plot_upper_bound]
        facts["sets"] = choice.of_sets
        facts["against_reference"] = not choice.of_sets and kind.against_reference()
        if name in self.missing:
            return facts | {"recipe": "", "undefined": f"unavailable: {self.missing[name]}"}
        made = self.made[name]
        if choice.of_sets:
            metric = set_metric(name, made)
            return facts | {
                "recipe": metric.recipe,
                "undefined": "there is nothing to compare with",
                "encoder": self.encoder_of(name),
                "frames": metric.frames,
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
    comparable = getattr(backbone, "comparable", False)
    return {"comparable": comparable, "weights": getattr(backbone, "weights_sha256", None)}


def settings_of(metric: Any) -> str:
    """Plain attributes of a metric that was given as an object; empty for a class."""
    if not isinstance(metric, Metric):
        return ""
    usual = vars(Metric).keys() | {"name", "recipe", "training", "features_recipe"}
    plain = {
        name: value
        for name, value in sorted(vars(metric).items())
        if isinstance(value, str | int | float) and not name.startswith("_") and name not in usual
    }
    return " ".join(f"{name}={value!r}" for name, value in plain.items())


def whole(names: Iterable[Any]) -> list[Any]:
    """The names, and instead of ``vbench_quality`` what it is computed from.

    Example:
        >>> whole(["psnr", "vbench_quality"])[:2], len(whole(["vbench_quality"]))
        (['psnr', 'subject_consistency/dino-vitb16'], 7)
    """
    named = {name for name in names if isinstance(name, str)}  # a metric has an == of its own
    parts = [name for name in VBENCH_METRICS.values() if name not in named]
    found = []
    for name in names:
        found += parts if isinstance(name, str) and name == VBENCH else [name]
    return found


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
