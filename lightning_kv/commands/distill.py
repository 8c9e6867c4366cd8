"""`lightning-kv distill`: from options to rounds of collecting and fitting, and a scorer's file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv.commands.calibrate import (
    config_of,
    frames_of,
    listed,
    prepared,
    prompts_of,
)
from lightning_kv.commands.evaluate import DataOptions, config_yaml, model_for
from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, quiet, say
from lightning_kv.tasks.options import DistillRecipe, DistillTrainerOptions
from lightning_kv.utilities.files import write_atomic
from lightning_kv.utilities.nearest import hint

if TYPE_CHECKING:  # they take seconds
    import lightning as L

    from lightning_kv.distillation.labels import Teacher
    from lightning_kv.models.wan import WanConfig
    from lightning_kv.tasks.distill import Distilled, Plan, Table
    from lightning_kv.tasks.distillation.work import DistillWork
    from lightning_kv.tasks.options import TrainerOptions


@dataclass
class DistillOptions:
    """Teach a small scorer which frames will be looked at, by what a full cache looked at later.

    Args:
        out: The file of the scorer, .safetensors.
        records: Folder of records and fits, where a stopped run goes on (OUT.records).
        model: One of `lightning-kv list models`, NAME=FILE, or a file.
        precision: float32, reference (the original's casts) or fast (the model's).
        text: Folder of embeddings, or of a text encoder (the shards' own).
        vae: Folder of the VAE (the fetched one).
        data: Prompts and worlds; not those that the scorer will be judged on.
        videos: Real videos with captions for prompts, and history (none).
        prompts: Prompts from the start of the set; null for all.
        samples: Noises per prompt; statistics count prompts.
        validate: Prompts of these that are held out; 0 for none.
        frames: Latent frames per clip, context included (panorama 72).
        context_frames: Given frames at the start (panorama 15, else 0).
        student: set (attention among candidates), mlp or linear.
        prior: It begins as h2o, snap-kv, recency, focused or future.
        embeddings: It knows layer and head; without, it can go to other models.
        without: Features left out, or content, norms, age, mass, others.
        teacher: As --teacher.target mass-future, .horizon 6, .discount 0.9.
        labels: From the reference rollout, or a shadow: a full cache on the clip itself.
        rounds: After the first, in which the scorer decides more and more.
        budgets: History frames, one per clip (4f to 12f, 15f, 18f).
        recipe: Of a fit, as --recipe.steps 3000, .batch, .lr, .patience.
        controls: Also fit a linear student, OUT-linear.safetensors.
        seed: Of noise, weights and what is drawn.
        size: HEIGHTxWIDTH in pixels (the model's own).
        negative: What guidance leads away from, for models with guidance.
        threads: CPU threads per process; can change the last digit.
        dry_run: Say what it would take, and stop; needs no weights.
        trainer: Where it runs.
    """

    out: Path = Path("scorer.safetensors")
    records: Path | None = None
    model: str = "panorama"
    precision: str | None = None
    text: Path | None = None
    vae: Path | None = None
    data: DataOptions = field(default_factory=lambda: DataOptions(seed=1))
    videos: Path | None = None
    prompts: int | None = 32
    samples: int = 1
    validate: int = 8
    frames: int | None = None
    context_frames: int | None = None
    student: str = "set"
    prior: str = "h2o"
    embeddings: bool = True
    without: list[str] = field(default_factory=list)
    teacher: dict[str, Any] = field(default_factory=dict)
    labels: str = "reference"
    rounds: int = 2
    budgets: list[str] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    controls: bool = True
    seed: int = 0
    size: str | None = None
    negative: str = ""
    threads: int = 1
    dry_run: bool = False
    trainer: DistillTrainerOptions = field(default_factory=DistillTrainerOptions)


def run(options: DistillOptions) -> None:
    """Distil, and say what came of it; or say what it would take."""
    quiet()
    if options.dry_run:
        work, known = work_of(options)
        say(console(), work.words(known))
        return
    found = distill(options)
    if found is None:  # another rank tells
        return
    out = console()
    if found.table:
        show(out, found.table)
    say(out, found.words)
    words = f"Run it: lightning-kv evaluate --policies 'full,{policy_text(found.file)}'"
    out.print(words, soft_wrap=True, markup=False)


def policy_text(file: Path) -> str:
    """A policy that runs with a scorer, as it is typed.

    >>> policy_text(Path("mine.safetensors"))
    '{name: mine, retain: {part: distilled, scorer: mine.safetensors, budget: 9f}}'
    """
    return f"{{name: {file.stem}, retain: {{part: distilled, scorer: {file}, budget: 9f}}}}"


def show(out: Any, table: Table) -> None:
    """Regret, recall and the like of every ranking, best first."""
    from rich.table import Table as Rich

    from lightning_kv.distillation.judging import OWN
    from lightning_kv.utilities.formatting import number

    names = [f"regret@{OWN}", *(x for x in table["oracle"] if x.startswith("regret@"))]
    names += [f"{what}@{OWN}" for what in ("recall", "age_residual_recall", "output_error")]
    names = [name for name in dict.fromkeys(names) if name in table["oracle"]]
    title = "Held-out lists; @k: candidates kept, own: as the budget of the clip had it"
    rich = Rich(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    rich.add_column("ranking")
    for name in names:
        rich.add_column(name.replace("_", " "), justify="right")
    first = names[0]
    for who, own in sorted(
        table.items(), key=lambda each: (each[1][first] is None, each[1][first])
    ):
        cells = ["" if own[name] is None else number(own[name]) for name in names]
        rich.add_row(who, *cells)
    out.print(rich)


def distill(options: DistillOptions) -> Distilled | None:
    """Run, or go on with, a distillation; rank 0 writes the files and says what came of it.

    Raises:
        ValueError: Anything that does not fit, before anything is collected, or a fit has come to
            nothing.
    """
    from lightning_kv.models.sources import find_model
    from lightning_kv.tasks.distill import Distillation, check_file
    from lightning_kv.tasks.trainer import is_first

    records = options.records or options.out.with_suffix(".records")
    check_file(options.out, records)
    check_whole(options.trainer)
    source = find_model(options.model)
    settings, evaluation, data = prepared(options, source)
    config, _ = config_of(options.model)
    plan = plan_of(options, evaluation.frames, config.chunk)
    collector_of = partial(collector, settings)
    device = collector_of([], records).strategy.root_device
    names = ("frames", "context_frames", "size", "negative")
    made = Distillation(
        plan,
        model_for(evaluation, source, data, device),
        data,
        options.out,
        records,
        collector_of,
        partial(fitter, settings),
        {name: getattr(evaluation, name) for name in names},
    )
    if is_first():
        made.check()
        records.mkdir(parents=True, exist_ok=True)
        write_atomic(records / "config.yaml", config_yaml(options))
    return made.run()


def check_whole(trainer: TrainerOptions) -> None:
    """Refuse rounds that are cut short: their fits would be taken up by whole ones.

    Raises:
        ValueError: They would be.
    """
    if trainer.limit_test_batches is not None:
        raise ValueError(
            f"A scorer is taught on whole rounds, and --trainer.limit_test_batches "
            f"{trainer.limit_test_batches} would leave clips out that its file says it was taught "
            "on. Give fewer prompts (--prompts)."
        )


def collector(settings: TrainerOptions, callbacks: list[L.Callback], folder: Path) -> L.Trainer:
    """A Trainer of all processes, which collects."""
    from lightning_kv.tasks.callbacks import CalibrationProgressBar
    from lightning_kv.tasks.trainer import trainer_for

    own = {"enable_checkpointing": False, "logger": False}
    return trainer_for(settings, callbacks, CalibrationProgressBar(), folder, **own)


def fitter(
    settings: TrainerOptions, callbacks: list[L.Callback], folder: Path, **given: Any
) -> L.Trainer:
    """A Trainer of this process alone, whatever started it, which fits."""
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from lightning_kv.tasks.callbacks import TrainingProgressBar
    from lightning_kv.tasks.trainer import logger_of, trainer_for

    alone = replace(
        settings,
        devices=1,
        num_nodes=1,
        strategy=None,
        plugins=None,
        precision="32-true",
        limit_test_batches=None,
        inference_mode=True,
    )
    named = ("csv",) if settings.logger is None else settings.logger
    loggers = [logger_of(each, folder, versions=True) for each in named]
    own = {"logger": loggers or False, "plugins": [LightningEnvironment()]}
    return trainer_for(alone, callbacks, TrainingProgressBar(), folder, **own, **given)


def plan_of(options: DistillOptions, frames: int, chunk: int) -> Plan:
    """What is distilled.

    Args:
        options: Of the command.
        frames: Latent frames of a clip.
        chunk: Frames of a chunk.

    Raises:
        ValueError: A name is not known, or a number makes no sense.
    """
    from lightning_kv.distillation.clips import Collecting
    from lightning_kv.policies.scorer.artifact import prior_of
    from lightning_kv.policies.scorer.students import STUDENTS
    from lightning_kv.tasks.distill import Plan, features_without
    from lightning_kv.tasks.distillation.collect import check_budgets, usual_budgets
    from lightning_kv.utilities.nearest import unknown

    if options.student not in STUDENTS:
        raise ValueError(unknown("student", options.student, STUDENTS))
    features = features_without(options.without)
    prior_of(options.prior, features)
    budgets = usual_budgets(frames, chunk)
    if options.budgets is not None:
        budgets = tuple(sorted({frames_of(own, "--budgets") for own in options.budgets}))
    check_budgets(budgets, frames, chunk)
    return Plan(
        student=options.student,
        prior=options.prior,
        features=features,
        embeddings=options.embeddings,
        collecting=Collecting(teacher_of(options.teacher), options.labels, budgets),
        rounds=options.rounds,
        recipe=recipe_of(options.recipe),
        validate=options.validate,
        controls=options.controls,
        seed=options.seed,
    )


def teacher_of(given: dict[str, Any]) -> Teacher:
    """The teacher, of which what is not given is usual.

    Raises:
        ValueError: A setting is not known, or out of range.
    """
    from lightning_kv.distillation.labels import Teacher

    return Teacher(**known(given, Teacher, "teacher"))


def recipe_of(given: dict[str, Any]) -> DistillRecipe:
    """The recipe, of which what is not given is usual.

    Raises:
        ValueError: A setting is not known, or cannot be followed.
    """
    found = known(given, DistillRecipe, "recipe")
    if "soft" in found:
        found["soft"] = tuple(number_in(str(own)) for own in listed(found["soft"]))
        if [*map(type, found["soft"])] != [float, float]:
            raise ValueError(
                f"--recipe.soft {given['soft']!r} does not fit. Give two numbers, such as 1.0,0.1."
            )
    return DistillRecipe(**found)


def known(given: dict[str, Any], kind: type, option: str) -> dict[str, Any]:
    """Settings of a mapping, with words as the numbers that they are.

    Raises:
        ValueError: One is not known.
    """
    import yaml

    names = list(kind.__dataclass_fields__)
    if wrong := sorted(given.keys() - set(names)):
        raise ValueError(
            f"--{option}.{wrong[0]} is not known.{hint(wrong[0], names)} It has {', '.join(names)}."
        )
    read = {name: yaml.safe_load(x) if isinstance(x, str) else x for name, x in given.items()}
    return {name: number_in(x) if isinstance(x, str) else x for name, x in read.items()}


def number_in(text: str) -> float | str:
    """What YAML leaves as text though people mean a number, such as 3e-3."""
    try:
        return float(text)
    except ValueError:
        return text


def work_of(options: DistillOptions) -> tuple[DistillWork, str]:
    """What it would take, and how the rate is known; nothing is read but the prompts, if any.

    Raises:
        ValueError: As `distill`, as far as that is known without weights.
    """
    from lightning_kv.tasks.calibration import work as costs
    from lightning_kv.tasks.distillation.collect import check_prompts
    from lightning_kv.tasks.distillation.work import CPU_FACTOR, DistillWork
    from lightning_kv.tasks.rollouts.lengths import read_size
    from lightning_kv.tasks.trainer import launched

    config, world = config_of(options.model)
    frames, context = lengths_of(options, config, world)
    settings = launched(replace(options.trainer, accelerator="cpu"))
    on_gpu = options.trainer.accelerator == "gpu" or not world
    plan, prompts = plan_of(options, frames, config.chunk), prompts_of(options)
    check_prompts(prompts, options.validate)
    own = plan.collecting
    outputs = own.queries if "outputs" in own.teacher.needs else 0
    work = DistillWork(
        config,
        read_size(options.size, config),
        frames,
        context,
        prompts,
        options.samples,
        options.validate,
        plan.rounds,
        own.budgets,
        outputs,
        own.labels == "shadow",
        options.videos is not None,
        plan.student,
        settings.devices * settings.num_nodes if isinstance(settings.devices, int) else 1,
        costs.GPU_RATE if on_gpu else costs.CPU_RATE,
        1.0 if on_gpu else CPU_FACTOR,
        plan.controls,
        plan.recipe,
    )
    return work, "assumed" if on_gpu else "measured"


def lengths_of(options: DistillOptions, config: WanConfig, world: bool) -> tuple[int, int]:
    """Latent frames of a clip, and how many of them are given.

    Raises:
        ValueError: They make no chunks of the model.
    """
    from lightning_kv.tasks.rollouts.settings import RolloutSettings

    found = RolloutSettings(options.frames, options.context_frames, options.size)
    found = found.filled(None if world else config)
    config.plan(found.frames, found.context_frames)
    return found.frames, found.context_frames


COMMAND = Command(
    "distill",
    DistillOptions,
    run,
    """\
The file serves every budget: {part: distilled, scorer: FILE, budget: 9f}. A stopped run goes on
when started again, also with other --devices; settings share what they can of it. For example:
  lightning-kv distill -c configs/distill.yaml --trainer.devices 2 -o scorer.safetensors
  lightning-kv distill --model wan-1.3b --frames 126 --devices 8 --dry_run""",
    metavars={
        "out": "FILE",
        "records": "FOLDER",
        "text": "FOLDER",
        "vae": "FOLDER",
        "videos": "VIDEOS",
        "data.shards": "FOLDER",
        "data.class_path": "CLASS",
        "data.init_args": "ARGS",
        "without": "NAME,...",
        "teacher": "ARGS",
        "recipe": "ARGS",
        "budgets": "FRAMES,...",
        "size": "HxW",
        "negative": "TEXT",
        "trainer.devices": "N",
    },
)
