"""Distil a policy: rounds of collecting and fitting, each of which a stopped run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch

from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.distillation.clips import Collecting
from lightning_kv.distillation.judging import OWN
from lightning_kv.distillation.labels import Teacher
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES, GROUPS
from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.calibration.records import mark_of
from lightning_kv.tasks.distillation.collect import CollectModule, ListWriter, mark_of_scorer
from lightning_kv.tasks.distillation.data import StatisticsData
from lightning_kv.tasks.distillation.distiller import KEPT, PolicyDistiller, check_recipe
from lightning_kv.tasks.distillation.fit import Table, TrainerOf, fit, judged
from lightning_kv.tasks.distillation.records import read_lists
from lightning_kv.tasks.measuring.fingerprint import surroundings, versions
from lightning_kv.tasks.options import DistillRecipe
from lightning_kv.tasks.trainer import is_first
from lightning_kv.tasks.training.module import commit
from lightning_kv.utilities.formatting import number, several
from lightning_kv.utilities.nearest import unknown

Found = TypeVar("Found")
CONTROL = "linear"
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Plan:
    """What is distilled, beside model and data.

    Args:
        student: set (attention among candidates), mlp or linear.
        prior: What it begins as, see :data:`~lightning_kv.policies.scorer.artifact.PRIORS`.
        features: What it looks at, in order.
        embeddings: Whether it knows which layer and head a list is of; without, it can be tried on
            a model of other layers and heads.
        collecting: Of round 0.
        rounds: On-policy rounds after it.
        recipe: Of each fit.
        validate: Held-out prompts.
        controls: Also fit a linear student to the same records.
        seed: Of the noise, of weights and of what is drawn.
    """

    student: str = "set"
    prior: str = "h2o"
    features: tuple[str, ...] = tuple(FEATURES)
    embeddings: bool = True
    collecting: Collecting = field(default_factory=lambda: Collecting(Teacher()))
    rounds: int = 2
    recipe: DistillRecipe = field(default_factory=DistillRecipe)
    validate: int = 8
    controls: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_recipe(self.recipe)
        if self.rounds < 0:
            raise ValueError(f"{self.rounds} rounds cannot be run. Give 0 for none, or more.")


@dataclass(frozen=True, eq=False)
class Distilled:
    """What came of a distillation.

    Args:
        scorer: As it was written.
        file: Where.
        table: Measures on held-out lists by whose ranking it is.
        words: What is to be said of it, in sentences.
    """

    scorer: Scorer
    file: Path
    table: Table
    words: tuple[str, ...]


@dataclass(eq=False)
class Distillation:
    """Rounds of collecting and fitting, and the file at the end.

    Below ``records`` lie ``round-0``, and of later rounds ``round-N-MARK``, with the mark of the
    scorer that decided in them; in each the records of clips, and in ``fit-MARK`` what was fitted
    to them and to those before. A mark is made of everything that a folder depends on: other
    settings use of it what is still theirs, and what was stopped goes on. Clips are collected by
    all ranks of a Trainer; a fit takes seconds, and runs on the first rank alone while the others
    wait, so its numbers are those of one process.

    Args:
        plan: What is distilled.
        model: The model.
        data: Prompts.
        out: File of the scorer, ``.safetensors``; the control lies beside it.
        records: Folder of the records.
        collector_of: Makes the Trainer that collects, with callbacks and a folder.
        fitter_of: Makes the Trainer of one process that fits, with callbacks, a folder and others
            of Lightning's arguments.
        rollouts: frames, context_frames, size and negative.
    """

    plan: Plan
    model: VideoModel
    data: PromptDataModule
    out: Path
    records: Path
    collector_of: TrainerOf
    fitter_of: TrainerOf
    rollouts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folders: list[Path] = []  # of the rounds so far
        self.scorers: list[Scorer] = []
        self._about: dict[str, Any] = {}

    def check(self) -> None:
        """Refuse what would be noticed after minutes of work.

        Raises:
            ValueError: The file has another ending, or its records are gone; a setting does not fit
                the model or the data.
        """
        check_file(self.out, self.records)
        self.module(0, None).check_data(self.data)
        self.fresh(self.plan.student)
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> Distilled | None:
        """Run, or go on; what came of it, on the first rank."""
        plan = self.plan
        for turn in range(plan.rounds + 1):
            start = self.scorers[-1] if self.scorers else None
            trainer, folder = self.collect(turn, start)
            self.folders.append(folder)
            self.scorers.append(on_first(trainer, lambda own=start: self.fitted(own)))
        folder = None
        if plan.validate:  # what the last one itself leads to
            trainer, folder = self.collect(plan.rounds + 1, self.scorers[-1], held_out=True)
        found = on_first(trainer, lambda: self.concluded(folder))
        return found if trainer.is_global_zero else None

    # -- stages --------------------------------------------------------------------------------

    def module(self, turn: int, scorer: Scorer | None, held_out: bool = False) -> CollectModule:
        """What collects the clips of a round."""
        plan = self.plan
        return CollectModule(
            self.model,
            replace(plan.collecting, round=turn),
            scorer,
            validate=plan.validate,
            held_out=held_out,
            seed=plan.seed,
            **self.rollouts,
        )

    def collect(
        self, turn: int, scorer: Scorer | None, held_out: bool = False
    ) -> tuple[L.Trainer, Path]:
        """Collect a round; the Trainer, and the folder of the records."""
        name = f"round-{turn}" + (f"-{mark_of_scorer(scorer)[:8]}" if scorer else "")
        writer = ListWriter(self.records / name)
        trainer = self.collector_of([writer], self.records / name)
        module = self.module(turn, scorer, held_out)
        if is_first():
            writer.open(trainer, module, self.data)
        if not turn:
            self._about = module.about() | {"surroundings": surroundings(trainer)}
        trainer.test(module, datamodule=self.data, verbose=False)
        return trainer, self.records / name

    def fitted(self, start: Scorer | None, kind: str | None = None) -> Scorer:
        """Fit a student to all records so far.

        Args:
            start: That of the round before, which it begins as; an untrained one where None.
            kind: Of the student; that of the plan where None.
        """
        plan = self.plan
        scorer = start or self.fresh(kind or plan.student)
        described = {
            "recipe": asdict(plan.recipe),
            "start": mark_of_scorer(scorer),
            "seed": plan.seed,
            "rounds": [folder.name for folder in self.folders],
            "clips": self.marks,
            "validate": plan.validate,
            "surroundings": self._about["surroundings"],
        }
        folder = self.folders[-1] / f"fit-{fingerprint(described)[:12]}"
        recipe = plan.recipe
        data = StatisticsData(
            self.folders,
            recipe.steps,
            recipe.batch,
            recipe.newest,
            stable_seed(plan.seed, "lists"),
            set(self.data.keys()),
        )
        return fit(folder, PolicyDistiller(scorer, recipe), data, self.fitter_of)

    def fresh(self, kind: str) -> Scorer:
        """An untrained scorer."""
        geometry = self.module(0, None).geometry
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.plan.seed, "student"))
            plan = self.plan
            return Scorer.fresh(kind, geometry, plan.features, plan.prior, plan.embeddings)

    @cached_property
    def marks(self) -> list[tuple[str, str]]:
        """Clips and what tells them from others, in the order of their keys."""
        return sorted((item.key, mark_of(item.prompt)) for item in self.data.items())

    # -- the end -------------------------------------------------------------------------------

    def concluded(self, last: Path | None) -> Distilled:
        """Write the files, and say what they are worth.

        Args:
            last: Records of held-out clips that the last scorer decided.
        """
        plan, keys = self.plan, set(self.data.keys())
        named = {"distilled": self.scorers[-1], "prior": self.fresh(plan.student)}
        if plan.controls and plan.student != CONTROL:
            named[CONTROL] = self.fitted(None, CONTROL)
        regrets: dict[str, list[float | None]] = {"off_policy": [], "on_policy": []}
        table: Table = {}
        if last is not None:
            held = [read_lists(own, True, keys).lists for own in (*self.folders, last)]
            for turn, own in enumerate(self.scorers):
                for name, lists in (("off_policy", held[0]), ("on_policy", held[turn + 1])):
                    found = judged(lists, {"own": own}).get("own", {})
                    regrets[name].append(found.get(f"regret@{OWN}"))
            table = judged(held[-1], named)
        about = self.about(table, regrets)
        for name, path in (("distilled", self.out), (CONTROL, self.control)):
            if name in named:
                told = {"fit": named[name].about["fit"]}
                named[name] = replace(named[name], about=about | told)
                named[name].save(path)
        return Distilled(named["distilled"], self.out, table, self.words(table, regrets))

    @property
    def control(self) -> Path:
        """File of the linear student."""
        return self.out.with_name(f"{self.out.stem}-{CONTROL}{self.out.suffix}")

    def about(self, table: Table, regrets: dict[str, list[float | None]]) -> dict[str, Any]:
        """What the file says of model, teacher, data and validation."""
        plan, data = self.plan, self.data
        held = self.module(0, None).validated(data)
        units = sorted({sample.key for sample in data.prompt_samples()})
        settings = self.module(0, None).settings
        told = {name: own for name, own in self._about.items() if name != "surroundings"}
        return told | {
            "rounds": plan.rounds,
            "prior": plan.prior,
            "recipe": asdict(plan.recipe),
            "data": {
                "prompts": [key for key in units if key not in held],
                "validation_prompts": [key for key in units if key in held],
                "clips": len(self.marks),
                "seeds": [plan.seed],
                "world_seed": data.seed,
                "frames": settings.frames,
                "context_frames": settings.context_frames,
                "fingerprint": f"sha256:{fingerprint({'clips': self.marks})}",
            },
            "validation": {"kept": [OWN, *KEPT], "table": table, "regrets": regrets},
            "software": versions() | {"device": self._about["surroundings"]["accelerator"]},
            "licence": LICENCE,
            "commit": commit(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def words(self, table: Table, regrets: dict[str, list[float | None]]) -> tuple[str, ...]:
        """What is to be said."""
        prompts = several(self.data.total - self.plan.validate, "prompt")
        found = [
            f"{self.out}: student {self.plan.student}, taught on {prompts} in "
            f"{several(self.plan.rounds + 1, 'round')}."
        ]
        if not table:
            return (*found, "No prompt was held out (--validate 0): what it is worth is not known.")
        by_hand = {
            name: own[f"regret@{OWN}"]
            for name, own in table.items()
            if name not in ("distilled", CONTROL, "oracle", "random")
        }
        known = {name: own for name, own in by_hand.items() if own is not None}
        own = table["distilled"][f"regret@{OWN}"]
        if own is None or not known:
            return (*found, "Held-out clips had nothing to decide: what it is worth is not known.")
        best = min(known, key=known.get)
        said = (
            f"Regret on held-out prompts, on the memories that it leads to (0 is the oracle, 1 is "
            f"chance): {number(own)}; best by hand: {best}, {number(known[best])}"
        )
        linear = table.get(CONTROL, {}).get(f"regret@{OWN}")
        said += f"; linear: {number(linear)}." if linear is not None else "."
        off, on = (_listed(regrets[name]) for name in ("off_policy", "on_policy"))
        return (
            *found,
            said,
            f"After each round, on the teacher's memories {off}; on its own {on}.",
            "These prompts also said when fits stop, and clips have other budgets in each round: "
            "to judge it, and its own memories against the teacher's, `lightning-kv prove scorer "
            f"{self.out}`.",
        )


def _listed(values: Sequence[float | None]) -> str:
    return ", ".join("none" if x is None else number(x) for x in values)


def on_first(trainer: L.Trainer, work: Callable[[], Found]) -> Found:
    """What work on the first rank comes to, on all ranks; the others wait for it.

    Args:
        trainer: Of all ranks.
        work: Must not speak to other ranks.

    Raises:
        Exception: The work has failed; the first rank says why, and others end.
    """
    found, error = None, None
    if trainer.is_global_zero:
        try:
            found = work()
        except Exception as wrong:  # whatever it is, the others wait for an answer
            error = wrong
    found, failed = trainer.strategy.broadcast((found, error is not None))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return found


def check_file(out: Path, records: Path) -> None:
    """Refuse a file of another kind, or one whose records are not there.

    Raises:
        ValueError: It is so.
    """
    if out.suffix != ".safetensors":
        raise ValueError(
            f"A scorer goes into a .safetensors file, and {str(out)!r} was given. Give "
            f"{out.with_suffix('.safetensors')}."
        )
    if out.exists() and not records.exists():
        raise ValueError(
            f"{out} is there already, and its records are not: there is no {records}. Give another "
            "file, the folder of its records (--records), or remove it."
        )


def features_without(left_out: Sequence[str]) -> tuple[str, ...]:
    """All features but some, or some groups of them.

    >>> len(features_without(["mass", "age"])), "lag" in features_without(["age"])
    (16, False)

    Args:
        left_out: Names of features or of groups; ``age`` is the group.

    Raises:
        ValueError: One is neither, or nothing is left.
    """
    gone: set[str] = set()
    for name in left_out:
        if name not in GROUPS and name not in FEATURES:
            raise ValueError(unknown("feature or group of features", name, [*GROUPS, *FEATURES]))
        gone |= set(GROUPS.get(name, (name,)))
    found = tuple(name for name in FEATURES if name not in gone)
    if not found:
        raise ValueError(
            f"Without {', '.join(left_out)} there is nothing to look at. Leave out less."
        )
    return found
