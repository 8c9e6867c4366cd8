"""`lightning-kv evaluate`: from options to a module, a data module, a Trainer and its callbacks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv.assets import file_of, found
from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, quiet, say
from lightning_kv.tasks.options import DEFAULT_POLICIES, TrainerOptions
from lightning_kv.utilities.files import write_atomic

if TYPE_CHECKING:  # they take seconds
    import torch
    from lightning import LightningDataModule

    from lightning_kv.models.sources import Source
    from lightning_kv.models.video import VideoModel
    from lightning_kv.tasks.evaluate import EvaluateModule
    from lightning_kv.tasks.rollouts.settings import RolloutSettings

FAST_PANS = Path("data/panorama-fast13")


@dataclass
class DataOptions:
    """What streams in.

    Args:
        shards: Folder of prompt shards, as `encode` makes them (13 fast pans).
        seed: Of the worlds that are drawn for the prompts.
        class_path: A data module of your own, package.module:Class (shards).
        init_args: Its arguments.
    """

    shards: Path | None = None
    seed: int = 0
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateOptions:
    """Roll out the reference and every policy from the same prompts and noise, and compare.

    Args:
        policies: Names (h2o@9f), YAML files, package.module:Class, or parts in place.
        budgets: Such as 6f,9f,15f, for policies whose budget is not named (none).
        reference: The policy that the others are compared with.
        model: One of `lightning-kv list models`, NAME=FILE, or a file.
        precision: float32, reference (the original's casts) or fast (the model's).
        text: Folder of embeddings, or of a text encoder (the shards' own).
        vae: Folder of the VAE (the fetched one).
        data: Prompts and worlds.
        prompts: Number of prompts from the start of the set (all).
        samples: Noises per prompt; statistics count prompts.
        frames: Latent frames per clip, context included (the model's; panorama 72).
        context_frames: Given frames at the start (0: the prompt alone; panorama 15).
        context_videos: Folder, shards or .csv of videos: their first frames are given, resized and
            not cropped, and their captions are the prompts; not beside --data.shards (none).
        size: HEIGHTxWIDTH in pixels (the model's own).
        seed: Of the noise.
        negative: What guidance leads away from, for models with guidance.
        metrics: See `list metrics`, or package.module:Class (all without weights).
        real: Folder of real videos for fvd and kvd (the panorama has its own).
        accept_license: Agree to that of non-commercial weights, such as cc-by-nc-4.0.
        decode: Make pixels: without, no videos and no metrics of pixels.
        latents: Keep the latents of every clip, for `decode`.
        out: Run directory; an unfinished run goes on there.
        batch: Clips rolled out together.
        backend: Attention kernel, sdpa or reference.
        threads: CPU threads per process; can change the last digit.
        videos: Prompts that get a comparison video (all).
        fps: Frames per second of videos (the model's own).
        trainer: Where it runs.
    """

    policies: list[str | dict[str, Any]] = field(default_factory=lambda: list(DEFAULT_POLICIES))
    budgets: list[str | float] | None = None
    reference: str = "full"
    model: str = "panorama"
    precision: str | None = None
    text: Path | None = None
    vae: Path | None = None
    data: DataOptions = field(default_factory=DataOptions)
    prompts: int | None = None
    samples: int = 1
    frames: int | None = None
    context_frames: int | None = None
    context_videos: Path | None = None
    size: str | None = None
    seed: int = 0
    negative: str = ""
    metrics: list[str | dict[str, Any]] | None = None
    real: Path | None = None
    accept_license: list[str] = field(default_factory=list)
    decode: bool = True
    latents: bool = False
    out: Path = Path("runs/evaluate")
    batch: int = 1
    backend: str = "sdpa"
    threads: int = 1
    videos: int | None = None
    fps: float | None = None
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


def run(options: EvaluateOptions) -> None:
    """Evaluate, and show the table."""
    quiet()
    summary = evaluate(options)
    if not summary:  # another rank tells
        return
    from lightning_kv.report.table import render_tables
    from lightning_kv.runs.directory import RunDirectory
    from lightning_kv.runs.verdict import verdict

    made, out = RunDirectory(options.out), console()
    out.print(render_tables(summary))
    say(out, verdict(summary, made.records()))
    out.print(
        f"Results are in {made.path}: {made.report.name}, report.md, table.tex, summary.json, "
        "records/, videos/, traces/",
        soft_wrap=True,
    )


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Run, or go on with, an evaluation; rank 0 writes its conclusions and returns the summary.

    Raises:
        ValueError: Anything that does not fit, before anything is written.
    """
    import torch

    from lightning_kv.models.sources import find_model
    from lightning_kv.tasks.callbacks import (
        ComparisonVideos,
        RecordWriter,
        RolloutProgressBar,
        TraceWriter,
    )
    from lightning_kv.tasks.trainer import is_first, launched, trainer_for

    settings = launched(options.trainer)
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads} leaves nobody to work. Use 1 or more.")
    torch.set_num_threads(options.threads)
    source = find_model(options.model)
    options = settled(options, source)
    writer = RecordWriter(options.out, options.latents)
    pictures = [kind(options.out, options.videos) for kind in (ComparisonVideos, TraceWriter)]
    data = data_of(options)
    trainer = trainer_for(
        settings,
        [writer, *pictures],
        RolloutProgressBar(),
        options.out,
        enable_checkpointing=False,
    )
    module = module_for(options, source, data, trainer.strategy.root_device)
    module.warns = False  # the table says it
    if is_first():
        writer.open(trainer, module, data)
        write_atomic(writer.run.config, config_yaml(options))
    trainer.test(module, datamodule=data, verbose=False)
    return writer.summary


def data_of(options: EvaluateOptions) -> LightningDataModule:
    """Prompts from shards, or the data module of the user's own.

    What such a class takes of ``shards``, ``prompts``, ``samples``, ``seed``, ``batch`` and
    ``context_videos`` it is given, unless ``init_args`` do.

    Raises:
        ValueError: There is no such class, it is no data module, or cannot be made so.
    """
    from lightning import LightningDataModule

    from lightning_kv.data.datamodule import PromptDataModule
    from lightning_kv.tasks.class_paths import class_of, instance, taken_by

    own = options.data
    given = {
        "shards": None if own.shards is None else found(own.shards),
        "prompts": options.prompts,
        "samples": options.samples,
        "seed": own.seed,
        "batch": options.batch,
        "context_videos": options.context_videos,
    }
    if own.class_path is None:
        if own.init_args:
            raise ValueError(
                f"--data.init_args {own.init_args} belong to no class. Give --data.class_path too."
            )
        return PromptDataModule(**given)
    taken = taken_by(class_of(own.class_path, LightningDataModule, "--data"))
    if options.context_videos is not None and "context_videos" not in taken:
        raise ValueError(
            f"--context_videos {options.context_videos} would not be used: --data.class_path "
            f"{own.class_path} takes {', '.join(sorted(taken)) or 'nothing'}. Leave it out, or "
            "give the class such an argument."
        )
    spec = {"class_path": own.class_path, "init_args": own.init_args}
    return instance(spec, LightningDataModule, "--data", given)


def settled(options: EvaluateOptions, source: Source) -> EvaluateOptions:
    """What was not given, as the model wants it.

    Raises:
        ValueError: No prompts are given, and the model has none of its own.
    """
    from lightning_kv.metrics.suite import Suite
    from lightning_kv.tasks.evaluate import known

    world, videos = source.config is None, videos_of(options)
    chosen = (options.data.shards, videos, options.data.class_path)
    if not world and chosen == (None, None, None):
        raise ValueError(
            f"Nothing says which prompts to give to {source.name!r}. Use --data.shards FOLDER; "
            "`lightning-kv encode prompts.txt --out FOLDER` makes one."
        )
    shards = options.data.shards or (FAST_PANS if world and not videos else None)
    prompts = shards or videos
    rollouts = rollouts_of(options).filled(source.config)
    usual = {
        "text": None if world or prompts is None else states_beside(prompts),
        "precision": "float32" if world else "reference",
        "metrics": list(Suite(None, known(world, options.decode)).choices),
    }
    missing = {name: value for name, value in usual.items() if getattr(options, name) is None}
    data = replace(options.data, shards=shards)
    return replace(options, data=data, **vars(rollouts), **missing)


def videos_of(options: EvaluateOptions) -> Path | None:
    """The context videos, of the option or of the ``init_args`` of a data module."""
    own = options.data.init_args.get("context_videos")
    return options.context_videos or (Path(own) if isinstance(own, str | Path) else None)


def states_beside(prompts: Path) -> Path | None:
    """The folder of prompts, or of a table of them, where it holds text states too."""
    from lightning_kv.models.embeddings import INDEX

    place = found(prompts)
    folder = place.parent if place.is_file() else place
    return folder if (folder / INDEX).is_file() else None


def rollouts_of(options: EvaluateOptions) -> RolloutSettings:
    """The settings of the rollouts."""
    from lightning_kv.tasks.rollouts.settings import RolloutSettings

    names = RolloutSettings.__dataclass_fields__
    return RolloutSettings(**{name: getattr(options, name) for name in names})


def module_for(
    options: EvaluateOptions, source: Source, data: LightningDataModule, device: torch.device
) -> EvaluateModule:
    """The module, once everything that can be known before weights are read has been checked."""
    from lightning_kv.metrics.suite import Suite
    from lightning_kv.tasks.class_paths import metrics_of
    from lightning_kv.tasks.evaluate import EvaluateModule, known
    from lightning_kv.tasks.rollouts.context import check_context
    from lightning_kv.tasks.rollouts.policies import check_inputs, chosen_policies

    chosen = [file_of(policy) for policy in options.policies]
    policies, reference = chosen_policies(chosen, file_of(options.reference), options.budgets)
    rollouts, accept = rollouts_of(options), tuple(options.accept_license)
    metrics = metrics_of(options.metrics)
    suite = Suite(metrics, known(source.config is None, options.decode), accept)
    if source.config is not None:  # before gigabytes are read
        everyone = [reference, *policies.values()]
        check_inputs(everyone, options.model, False)
        rollouts.check(options.model, source.config, everyone)
        sets = [] if options.real else list(suite.set_metrics())
        check_context(options.model, source.config, False, rollouts, data, sets)
    module = EvaluateModule(
        model_for(options, source, data, device),
        list(policies.values()),
        reference,
        metrics,
        **vars(rollouts),
        real=options.real,
        accept_license=accept,
    )
    module.check_data(data)
    return module


def model_for(
    options: EvaluateOptions, source: Source, data: LightningDataModule, device: torch.device
) -> VideoModel:
    """The model.

    Raises:
        ValueError: It does not fit on the device, or the text states are not on disk.
    """
    from lightning_kv.models.loading import check_memory, load_model

    if source.config is not None:  # before gigabytes are read
        check_memory(source.config, options.precision, device)
        check_text(options, source)
    texts = data.prompt_texts() if hasattr(data, "prompt_texts") else None
    guided = source.config is not None and source.config.guidance != 1
    return load_model(
        options.model,
        precision=options.precision,
        text=options.text,
        vae=options.vae,
        decode=options.decode or bool(getattr(data, "video_infos", None)),  # what encodes them
        prompts=None if texts is None else texts + [options.negative] * guided,
    )


def check_text(options: EvaluateOptions, source: Source) -> None:
    """Refuse a text encoder: every process would hold it, and encode every prompt again.

    Raises:
        ValueError: The text states are not on disk.
    """
    from lightning_kv.models.embeddings import INDEX

    folder = options.text or source.text
    if folder is None or not (folder / INDEX).is_file():
        prompts = options.data.shards or videos_of(options)
        if prompts is None:
            raise ValueError(
                "Nothing says where the text states of the prompts are, and an evaluation runs no "
                f"text encoder. Given --data.class_path {options.data.class_path}. Give --text "
                "FOLDER too; `lightning-kv encode prompts.txt --out FOLDER` makes one."
            )
        raise ValueError(
            f"The prompts in {prompts} have no text states, and an evaluation runs no text "
            f"encoder. Type `lightning-kv encode {prompts}` first (a folder of videos as shards: "
            "`lightning-kv shards make`), or give --text FOLDER that it wrote."
        )


def config_yaml(options: EvaluateOptions) -> str:
    """The effective settings, readable by ``-c``."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump(plain(asdict(options)), sort_keys=False)


COMMAND = Command(
    "evaluate",
    EvaluateOptions,
    run,
    """\
What is not given is the model's own; see `lightning-kv list policies`, `list parts`. For example:
  lightning-kv evaluate -c configs/evaluate.yaml --budgets 6f,9f,15f --trainer.devices 2
  lightning-kv evaluate --policies [full,mine.yaml@9f,my_pkg.mine:Part@9f] --out runs/mine""",
    metavars={
        "text": "FOLDER",
        "vae": "FOLDER",
        "real": "FOLDER",
        "context_videos": "VIDEOS",
        "data.shards": "FOLDER",
        "data.class_path": "CLASS",
        "data.init_args": "ARGS",
        "size": "HxW",
        "negative": "TEXT",
        "accept_license": "ID,...",
        "out": "DIR",
        "trainer.devices": "N",
    },
)
