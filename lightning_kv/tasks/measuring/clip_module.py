"""What modules that measure clips have in common: metrics by name, states after a resume, logs."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kv.data.datamodule import PromptDataModule, RolloutItem
from lightning_kv.data.videos import VideoError, VideoFile
from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.set_base import SetMetric
from lightning_kv.metrics.suite import Suite
from lightning_kv.runs.features import Features, FeatureStore
from lightning_kv.tasks.measuring.adapter import Measured
from lightning_kv.tasks.measuring.real_videos import encode_real
from lightning_kv.tasks.measuring.warnings import Problem, gathered, warn_lacking, warn_missing

log = logging.getLogger(__name__)


@dataclass
class ClipResult:
    """What a step says about one clip; callbacks find a list of them in ``outputs["clips"]``.

    Args:
        name: Of the policy, or of the folder of videos.
        key: Of the clip: prompt and noise.
        unit: What statistics count: clips of one unit are samples of it.
        prompt: What the model was told.
        measured: Values, curves and features.
        sample: Which noise of the prompt.
        cost: Bytes, rows and seconds, see :mod:`lightning_kv.runs.directory`.
        failure: Why it cannot be measured; None where it can.
        latents: ``[F, C, h, w]``; None where only pixels are known.
        pixels: ``[P, 3, H, W]`` in [0, 1]; None where none were made, or they went by.
        truth: What really follows, as ``pixels`` or uint8; None where nobody knows.
        real: Features of what sets are compared with, by encoder, where this clip brings them.
        extra: More fields of the record.
        last: Whether it is the last of its prompt and noise.
    """

    name: str
    key: str
    unit: str
    prompt: str
    measured: Measured
    sample: int = 0
    cost: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    latents: Tensor | None = None
    pixels: Tensor | None = None
    truth: Tensor | None = None
    real: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    last: bool = False


class ClipModule(L.LightningModule):
    """Measures the clips of several names: one is the reference, which comes first.

    Every name has a ``MetricCollection`` of metrics of clips and one of metrics of sets. They are
    logged once, at the end of the test loop, on every rank, as ``NAME/METRIC``; where records of
    an earlier start are taken up (:meth:`restore`), that is true of all clips together.

    Args:
        suite: What is measured.
        real: Videos that sets are compared with, by key; where there are none, sets are compared
            with what the world really shows, or else with the clips of the reference.
        reference: Name that the others are compared with.
        names: All names in the order of the tables, the reference first.

    Attributes:
        warns: Whether metrics without any value are said at the start and the end of a test.
    """

    data_kind: type[L.LightningDataModule] = PromptDataModule
    warns = True

    def __init__(
        self,
        suite: Suite,
        names: Sequence[str],
        reference: str,
        real: Mapping[str, VideoFile] | None = None,
    ) -> None:
        super().__init__()
        self.suite, self.names, self.reference_name = suite, list(names), reference
        self.real = dict(real or {})
        self.clip_metrics = nn.ModuleList(
            MetricCollection(dict(suite.clip_metrics()), compute_groups=False) for _ in names
        )
        self.set_metrics = nn.ModuleList(
            MetricCollection(dict(suite.set_metrics()), compute_groups=False) for _ in names
        )
        self.encoders = nn.ModuleDict(suite.encoders())
        self.known: set[tuple[str, str]] = set()
        self.with_features: set[tuple[str | None, str]] = set()
        self.store: FeatureStore | None = None  # where a callback keeps features, if one does
        self.skipped: list[str] = []
        self.problems: Counter[Problem] = Counter()
        self.unable: dict[tuple[str, str], str] = {}  # why a set has no value, by name and metric
        self._taken_up: L.Trainer | None = None  # by whose callback records were taken up

    @property
    def shows_truth(self) -> bool:
        """Whether sets are compared with what worlds, or videos, really show."""
        return False

    def check_data(self, data: Any) -> None:
        """Refuse a data module whose clips this module cannot measure.

        Raises:
            ValueError: It is one.
        """

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is known about the metrics: unit, direction, recipe, bounds."""
        return self.suite.facts()

    def metrics_of(self, name: str) -> dict[str, ClipMetric]:
        """Metrics of the clips of a name."""
        return dict(self.clip_metrics[self.names.index(name)].items())

    def sets_of(self, name: str) -> dict[str, SetMetric]:
        """Metrics of the set of clips of a name; none for a reference that they compare with."""
        if name == self.reference_name and not (self.real or self.shows_truth):
            return {}
        return dict(self.set_metrics[self.names.index(name)].items())

    def add(self, result: ClipResult) -> None:
        """Let the metrics know of a clip, as far as they do not."""
        name, key, unit = result.name, result.key, result.unit
        fresh = (name, key) not in self.known
        self.known.add((name, key))
        if fresh:
            self._note(name, result.failure, result.measured.problems)
        if result.failure:
            return
        if fresh:
            for metric, curve in result.measured.curves.items():
                self.metrics_of(name)[metric].add(curve, id=key, unit=unit)
        self._add_features(name, key, unit, result.measured.features)
        self.add_real(key, unit, result.real)

    def _note(self, name: str, failure: str | None, problems: Mapping[str, str] | None) -> None:
        """Count why a clip has no values, or not all."""
        found = {"": failure} if failure else (problems or {})
        self.problems.update((name, what, why) for what, why in found.items())

    def _add_features(self, name: str, key: str, unit: str, features: Mapping[str, Tensor]) -> None:
        if not features or (name, key) in self.with_features:
            return
        self.with_features.add((name, key))
        for metric, each in self.sets_of(name).items():
            found = features.get(self.suite.encoder_of(metric))
            self._update(each, found, False, key, unit)
            if found is not None and not len(found):
                why = f"shorter than its window of {each.frames} frames"
                self.problems[name, metric, why] += 1
        if name == self.reference_name and not (self.real or self.shows_truth):
            self.add_real(key, unit, features)

    def add_real(self, key: str, unit: str, features: Mapping[str, Tensor]) -> None:
        """Let the metrics of sets know of a real clip: its features by encoder."""
        if not features or (None, key) in self.with_features:
            return
        self.with_features.add((None, key))
        for name in self.names:
            for metric, each in self.sets_of(name).items():
                self._update(each, features.get(self.suite.encoder_of(metric)), True, key, unit)

    @staticmethod
    def _update(
        metric: SetMetric, features: Tensor | None, real: bool, key: str, unit: str
    ) -> None:
        if features is not None and len(features):
            metric.update_features([features], real, ids=[key], units=[unit])

    def restore(self, records: Iterable[Mapping[str, Any]], store: FeatureStore | None) -> None:
        """Go on where an earlier start of the run stood.

        One rank takes up the records; the others only learn which clips are known.

        Args:
            records: Of the run.
            store: Features of its clips.
        """
        self.forget()  # a test that was interrupted has not
        self.store, self._taken_up = store, self._trainer
        for record in records:
            name, key = record["policy"], record["key"]
            if name not in self.names:
                continue
            if self.global_rank == 0:
                self._note(name, record.get("failure"), record.get("problems"))
            if self.global_rank == 0 and not record.get("failure"):
                self._restore(record, store)
            self.known.add((name, key))
        if self.global_rank == 0 and store is not None and self.shows_truth:
            units = {record["key"]: record.get("unit", record["key"]) for record in records}
            for key, unit in units.items():
                self.add_real(key, unit, tensors(store.read(None, key)))

    def _restore(self, record: Mapping[str, Any], store: FeatureStore | None) -> None:
        name, key, unit = record["policy"], record["key"], record.get("unit", record["key"])
        own = self.metrics_of(name)
        for metric, curve in record["curves"].items():
            if metric in own and curve:
                values = [torch.nan if value is None else value for value in curve]
                own[metric].add(torch.tensor(values, dtype=torch.float64), id=key, unit=unit)
        if store is not None:
            self._add_features(name, key, unit, tensors(store.read(name, key)))

    def on_test_start(self) -> None:
        """Show the real videos to the encoders, each on one rank.

        Raises:
            ValueError: None of them can be used.
        """
        if self._taken_up is not self._trainer:
            self.forget()  # a test that was interrupted has not
        if self.warns:
            warn_missing(self.suite.missing)
        skipped = []
        for key in sorted(self.real)[self.global_rank :: self.trainer.world_size]:
            try:
                found = encode_real(key, self.real[key], self.encoders, self.store)
            except VideoError as error:
                skipped.append(f"real {key}: {error}")
                continue
            self.add_real(key, key, found)
        self.skipped = gathered(skipped, self.trainer) if self.real else []
        if self.trainer.is_global_zero:
            for each in self.skipped:
                log.warning("Skipped: %s", each)
        if self.real and len(self.skipped) == len(self.real):
            why = self.skipped[0].rstrip(".")
            raise ValueError(
                f"None of {len(self.real)} real videos can be used. {why}. Give others to --real."
            )

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse what this module cannot measure.

        Raises:
            ValueError: It is no item of its kind of data module.
        """
        if why := self.misfit(batch):
            kind = type(self).data_kind.__name__
            raise ValueError(
                f"{type(self).__name__} cannot measure what the dataloader gives: {why}. Call "
                f"trainer.test(module, datamodule={kind}(...))."
            )

    def misfit(self, batch: Any) -> str | None:
        """What is wrong with a batch; None where nothing is."""
        listed = batch if isinstance(batch, list) else [batch]
        if listed is not batch or not all(isinstance(each, RolloutItem) for each in listed):
            kinds = sorted({type(each).__name__ for each in listed})
            return f"not a list of RolloutItem, but {', '.join(kinds)}"
        wanted = {each.policy for each in batch}
        if len(wanted) != 1 or not wanted <= set(self.names):
            given = ", ".join(map(repr, sorted(wanted))) or "none"
            return f"items of one of the policies {', '.join(self.names)} are due, not of {given}"
        return None

    def forget(self) -> None:
        """Start anew: no clip is known."""
        for metrics in (*self.clip_metrics, *self.set_metrics):
            metrics.reset()
        self.known.clear()
        self.with_features.clear()
        self.problems.clear()
        self._taken_up = None

    def results(self) -> dict[str, Metric]:
        """Every metric that has a value, as ``NAME/METRIC``; every rank has to call this."""
        found: dict[str, Metric] = {}
        self.unable.clear()
        with warnings.catch_warnings():  # that a metric without clips has no value is no news
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method.*")
            for name in self.names:
                for metric, each in self.metrics_of(name).items():
                    if not each.compute().isnan():
                        found[f"{name}/{metric}"] = each
                for metric, each in self.sets_of(name).items():
                    try:
                        each.compute()
                    except ValueError as error:  # on all ranks alike
                        self.unable[name, metric] = str(error).partition(". ")[0]
                        if each._is_synced:
                            each.unsync()
                        continue
                    found[f"{name}/{metric}"] = each
        return found

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all ranks together."""
        found = self.results()
        for name, metric in found.items():
            self.log(name, metric)
        if self.warns:
            self._warn(found)

    def _warn(self, found: Mapping[str, Metric]) -> None:
        """Say which metrics have no value; every rank has to call this."""
        problems: Counter[Problem] = Counter()
        for problem, clips in gathered(self.problems.items(), self.trainer):
            problems[problem] += clips
        seen = set(gathered({name for name, _ in self.known}, self.trainer))
        facts = self.facts()
        for metric in self.suite.made:
            of_sets = facts[metric]["sets"]
            names = [
                name
                for name in self.names
                if name in seen and f"{name}/{metric}" not in found and self._due(metric, name)
            ]
            if names:
                usual = self.unable.get((names[0], metric), facts[metric]["undefined"])
                kinds = [metric, *([self.suite.encoder_of(metric)] if of_sets else [])]
                warn_lacking(metric, names, kinds, problems, usual)

    def _due(self, metric: str, name: str) -> bool:
        """Whether a metric should have a value for a name: not for what it compares with."""
        if name != self.reference_name:
            return True
        own = self.metrics_of(name)
        return not own[metric].against_reference() if metric in own else bool(self.sets_of(name))

    def on_test_end(self) -> None:
        """Start anew next time: the Trainer has reset what was logged."""
        self.forget()


def tensors(features: Features | None) -> dict[str, Tensor]:
    """Arrays of a file as tensors; none where there is no file."""
    return {name: torch.from_numpy(each) for name, each in (features or {}).items()}
