"""`lightning-kv calibrate`: from options to a module, prompts, a Trainer and a file of curves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv.assets import file_of
from lightning_kv.commands.evaluate import (
    DataOptions,
    EvaluateOptions,
    config_yaml,
    data_of,
    model_for,
    settled,
)
from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, quiet, say
from lightning_kv.tasks.options import TrainerOptions
from lightning_kv.utilities.files import write_atomic
from lightning_kv.utilities.lists import items_of
from lightning_kv.utilities.nearest import hint

if TYPE_CHECKING:  # they take seconds
    from lightning_kv.calibration.sites import SiteSettings
    from lightning_kv.data.datamodule import PromptDataModule
    from lightning_kv.models.sources import Source
    from lightning_kv.models.wan import WanConfig
    from lightning_kv.tasks.calibration.conclude import Calibration
    from lightning_kv.tasks.calibration.module import RecordsModule
    from lightning_kv.tasks.calibration.work import Work
    from lightning_kv.tasks.callbacks.clip_records import ClipRecordWriter


@dataclass
class CalibrateOptions:
    """Measure what each head loses when it reads fewer frames of history, for head budgets.

    Args:
        out: The file of head curves, .safetensors.
        records: Folder of records, where a stopped run goes on (OUT.records).
        model: One of `lightning-kv list models`, NAME=FILE, or a file.
        precision: float32, reference (the original's casts) or fast (the model's).
        text: Folder of embeddings, or of a text encoder (the shards' own).
        vae: Folder of the VAE (the fetched one).
        data: Prompts and worlds; not those that budgets will be judged on.
        videos: Real videos with captions for prompts, and history (none).
        prompts: Prompts from the start of the set; null for all.
        samples: Noises per prompt; statistics count prompts.
        reach: History frames that curves end at (panorama 24f, else 18f).
        reference: Holds at least so many frames (a window; full for memories).
        scorers: What keeps frames: mass, recency, or a part.
        sink: First frames of the clip that every head keeps.
        frames: Latent frames per clip, context included (panorama 72).
        context_frames: Given frames at the start (panorama 15, else 0).
        chunks: Chunks of a clip in which heads are judged.
        probes: Random directions of a pass; 0 leaves them out.
        measuring: More of that: steps, rows, batch, every, seed.
        validate: Prompts that are also measured exactly; 0 for none.
        exact: At which frames, or all (0, 1/8, 1/4 and 1/2 of the reach).
        mean: Mean budget that is asked for (a quarter of the reach).
        labels: Write labels of heads for the presets that read them.
        size: HEIGHTxWIDTH in pixels (the model's own).
        seed: Of the noise.
        negative: What guidance leads away from, for models with guidance.
        threads: CPU threads per process; can change the last digit.
        dry_run: Say what it would take, and stop; needs no weights.
        trainer: Where it runs.
    """

    out: Path = Path("heads.safetensors")
    records: Path | None = None
    model: str = "panorama"
    precision: str | None = None
    text: Path | None = None
    vae: Path | None = None
    data: DataOptions = field(default_factory=lambda: DataOptions(seed=1))
    videos: Path | None = None
    prompts: int | None = 16
    samples: int = 1
    reach: str | None = None
    reference: str | None = None
    scorers: list[str] = field(default_factory=lambda: ["mass", "recency"])
    sink: int = 0
    frames: int | None = None
    context_frames: int | None = None
    chunks: int = 3
    probes: int = 4
    measuring: dict[str, Any] = field(default_factory=dict)
    validate: int = 4
    exact: list[int] | None = None
    mean: float | None = None
    labels: bool = True
    size: str | None = None
    seed: int = 0
    negative: str = ""
    threads: int = 1
    dry_run: bool = False
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


def run(options: CalibrateOptions) -> None:
    """Calibrate, and say what came of it; or say what it would take."""
    quiet()
    if options.dry_run:
        work, known = work_of(options)
        say(console(), work.words(known))
        return
    found = calibrate(options)
    if found is None:  # another rank tells
        return
    out = console()
    say(out, found.words)
    mean = found.curves.about["checks"]["mean"]
    out.print(
        f"Look at budgets: lightning-kv budgets {options.out} --rule optimal --mean {mean:g}",
        soft_wrap=True,
    )


def calibrate(options: CalibrateOptions) -> Calibration | None:
    """Run, or go on with, a calibration; rank 0 writes the file and says what came of it.

    Raises:
        ValueError: Anything that does not fit, before anything is measured.
    """
    from lightning_kv.models.sources import find_model
    from lightning_kv.tasks.calibrate import CalibrateModule
    from lightning_kv.tasks.callbacks import CurveWriter

    source = find_model(options.model)
    module_of = partial(
        CalibrateModule,
        measuring=measuring_of(options, source.config is None),
        reference=None if options.reference is None else file_of(options.reference),
        validate=options.validate,
        labels=options.labels,
    )
    writer = CurveWriter(options.out, options.records, options.mean)
    return measured(options, source, writer, module_of, backward=True)


def measured(
    options: Any,
    source: Source,
    writer: ClipRecordWriter,
    module_of: Callable[..., RecordsModule],
    backward: bool = False,
) -> Any:
    """Run, or go on with, what measures clips; what came of it, on rank 0.

    Args:
        options: Of the command: model, data and Trainer, named as those of `evaluate`.
        source: Of the model.
        writer: Of the records.
        module_of: Makes the module of a model and the settings of rollouts.
        backward: Gradients of attention are taken, which on a GPU may differ from run to run.

    Raises:
        ValueError: Anything that does not fit, before anything is measured.
    """
    from lightning_kv.tasks.callbacks import CalibrationProgressBar
    from lightning_kv.tasks.trainer import is_first, trainer_for

    settings, evaluation, data = prepared(options, source)
    if backward and settings.deterministic is None and settings.accelerator == "gpu":
        settings.deterministic = "warn"
    trainer = trainer_for(
        settings, [writer], CalibrationProgressBar(), writer.run.path, enable_checkpointing=False
    )
    names = ("frames", "context_frames", "size", "seed", "negative")
    module = module_of(
        model_for(evaluation, source, data, trainer.strategy.root_device),
        **{name: getattr(evaluation, name) for name in names},
    )
    if is_first():
        writer.open(trainer, module, data)
        write_atomic(writer.run.config, config_yaml(options))
    trainer.test(module, datamodule=data, verbose=False)
    return writer.found


def prepared(
    options: Any, source: Source
) -> tuple[TrainerOptions, EvaluateOptions, PromptDataModule]:
    """Trainer settings with nothing left open, model and data as an evaluation has them, prompts.

    Args:
        options: Of the command, as :func:`measured` takes them.
        source: Of the model.

    Raises:
        ValueError: Something does not fit.
    """
    import torch

    from lightning_kv.tasks.trainer import launched

    settings = launched(options.trainer)
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads} leaves nobody to work. Use 1 or more.")
    torch.set_num_threads(options.threads)
    evaluation = settled(as_evaluation(options), source)
    return settings, evaluation, data_of(evaluation)


def as_evaluation(options: Any) -> EvaluateOptions:
    """What an evaluation is told of model and data, which is found alike here."""
    names = ("model", "precision", "text", "vae", "data", "prompts", "samples", "frames", "size")
    names += ("context_frames", "seed", "negative", "threads", "trainer")
    told = {name: getattr(options, name) for name in names}
    return EvaluateOptions(**told, context_videos=options.videos, metrics=[], decode=False)


def measuring_of(options: CalibrateOptions, world: bool) -> SiteSettings:
    """What is measured in a pass.

    Args:
        options: Of the command.
        world: Whether the model is of the panorama.

    Raises:
        ValueError: A number makes no sense.
    """
    from lightning_kv.calibration.scorers import canonical
    from lightning_kv.calibration.sites import SiteSettings

    reach = frames_of(options.reach or ("24f" if world else "18f"), "--reach")
    low = options.sink
    usual = sorted({max(low, own) for own in (low, reach // 8, reach // 4, reach // 2)})
    exact = usual if options.exact is None else options.exact
    if exact == ["all"]:
        exact = range(low, reach + 1)
    told = {
        "reach": reach,
        "scorers": tuple(dict.fromkeys(map(canonical, options.scorers))),
        "sink": low,
        "chunks": options.chunks,
        "probes": options.probes,
        "exact": tuple(sorted({*map(whole, exact)})),
    }
    return SiteSettings(**told, **more_of(options.measuring, told))


def more_of(given: dict[str, Any], told: Collection[str]) -> dict[str, Any]:
    """Settings of a pass that have no option of their own.

    Args:
        given: By name, steps as a list.
        told: Names of those that have one.

    Raises:
        ValueError: One is not known, or has one.
    """
    from lightning_kv.calibration.sites import SiteSettings

    left = [name for name in SiteSettings.__dataclass_fields__ if name not in told]
    if wrong := sorted(given.keys() - set(left)):
        raise ValueError(
            f"--measuring.{wrong[0]} is not known.{hint(wrong[0], left)} It has {', '.join(left)}; "
            "all else is an option of its own."
        )
    found = {name: whole(value) for name, value in given.items() if name != "steps"}
    if "steps" in given:
        found["steps"] = tuple(map(whole, listed(given["steps"])))
    return found


def listed(value: Any) -> list[Any]:
    """A list, as it is or as it is typed: ``0,-1``, or one number."""
    if isinstance(value, str):
        return items_of(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def whole(text: Any) -> int:
    """A whole number of a list.

    Raises:
        ValueError: It is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number. Give a list such as 0,3,6.") from None


def frames_of(text: str, option: str) -> int:
    """A number of frames, with or without its unit.

    >>> frames_of("24f", "--reach"), frames_of("24", "--reach")
    (24, 24)

    Raises:
        ValueError: It is none.
    """
    number = str(text).removesuffix("f")
    if not number.isdigit() or not int(number):
        raise ValueError(f"{option} {text} is no number of frames. Give one, such as 24f.")
    return int(number)


def work_of(options: CalibrateOptions) -> tuple[Work, str]:
    """What it would take, and how the rate is known; nothing is read but the prompts, if any.

    Raises:
        ValueError: As `calibrate`, as far as that is known without weights.
    """
    import torch

    from lightning_kv.models.precision import known_profile
    from lightning_kv.tasks.calibration import work as costs
    from lightning_kv.tasks.rollouts.lengths import read_size
    from lightning_kv.tasks.rollouts.settings import RolloutSettings
    from lightning_kv.tasks.trainer import launched

    config, world = config_of(options.model)
    settings = launched(replace(options.trainer, accelerator="cpu"))
    rollouts = RolloutSettings(options.frames, options.context_frames, options.size)
    rollouts = rollouts.filled(None if world else config)
    config.plan(rollouts.frames, rollouts.context_frames)
    on_gpu = options.trainer.accelerator == "gpu" or not world
    rate, known = (costs.GPU_RATE, "assumed") if on_gpu else (costs.CPU_RATE, "measured")
    precision = options.precision or ("float32" if world else "reference")
    work = costs.Work(
        config,
        read_size(options.size, config),
        measuring_of(options, world),
        rollouts.frames,
        rollouts.context_frames,
        prompts_of(options),
        options.samples,
        options.validate,
        options.videos is not None,
        settings.devices * settings.num_nodes if isinstance(settings.devices, int) else 1,
        torch.finfo(known_profile(precision).dtype).bits // 8,
        rate,
        held_at_most(options, measuring_of(options, world), rollouts.frames),
        1.0 if on_gpu else costs.CPU_LOOKUPS,
    )
    return work, known


def held_at_most(options: CalibrateOptions, measuring: SiteSettings, frames: int) -> int:
    """Frames of history that the reference holds at most."""
    from lightning_kv.policies.budgets import Amount
    from lightning_kv.policies.registry import load_policy
    from lightning_kv.tasks.calibration.module import usual_reference

    given = None if options.reference is None else file_of(options.reference)
    budget = load_policy(given or usual_reference(measuring)).retain.budget
    amount = None if budget is None else Amount.parse(budget.amount)
    return int(amount.value) if amount and amount.unit == "f" else frames


def prompts_of(options: Any) -> int:
    """How many prompts there would be.

    Raises:
        ValueError: Nothing says it, or they are too few.
    """
    from lightning_kv.tasks.calibration.conclude import check_enough

    if options.prompts is not None:
        check_enough(options.prompts, "are asked for")
        return options.prompts
    if options.data.shards is None and options.videos is None:
        raise ValueError(
            "Nothing says how many prompts there would be: --prompts null was given, and no set. "
            "Give --prompts N, or --data.shards FOLDER."
        )
    return data_of(as_evaluation(options)).total


def config_of(name: str) -> tuple[WanConfig, bool]:
    """Sizes of a model, whether its weights are here or not, and whether it is of the panorama.

    Raises:
        ValueError: No such model.
    """
    from lightning_kv.models.catalogue import CATALOGUE
    from lightning_kv.models.embedded import shipped
    from lightning_kv.models.sizes import PRESETS
    from lightning_kv.models.sources import find_model

    if name in PRESETS:
        return PRESETS[name], name in shipped()
    if name in CATALOGUE:
        return CATALOGUE[name].config, False
    source = find_model(name)
    return (PRESETS["panorama"], True) if source.config is None else (source.config, False)


COMMAND = Command(
    "calibrate",
    CalibrateOptions,
    run,
    """\
Loss against frames for each head, by attention alone, by probes of the estimate (gn), exactly. One
file serves every budget and rule: `lightning-kv budgets FILE`, {part: calibrated, heads: FILE}. A
stopped run goes on when started again, also with other --devices and more prompts. For example:
  lightning-kv calibrate -c configs/calibrate.yaml --trainer.devices 2 -o heads.safetensors
  lightning-kv calibrate --model wan-1.3b --frames 126 --prompts 32 --devices 8 --dry_run""",
    metavars={
        "out": "FILE",
        "records": "FOLDER",
        "text": "FOLDER",
        "vae": "FOLDER",
        "videos": "VIDEOS",
        "data.shards": "FOLDER",
        "data.class_path": "CLASS",
        "data.init_args": "ARGS",
        "reach": "FRAMES",
        "measuring": "ARGS",
        "reference": "POLICY",
        "mean": "FRAMES",
        "size": "HxW",
        "negative": "TEXT",
        "trainer.devices": "N",
    },
)
