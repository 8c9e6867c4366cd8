"""From ``--trainer.*`` and the launcher (python, fabric run, torchrun, srun) to a Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightning_kv.tasks.class_paths import instance, is_address
from lightning_kv.tasks.options import TrainerOptions, TrainingTrainerOptions
from lightning_kv.utilities.nearest import hint

if TYPE_CHECKING:  # it takes seconds
    from lightning import Callback, Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler

Settings = TypeVar("Settings", TrainerOptions, TrainingTrainerOptions)


def resolved(accelerator: str) -> str:
    """``auto`` as a CUDA GPU if there is one, else the CPU (other devices lack float64).

    Raises:
        ValueError: A GPU is asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if accelerator == "gpu" and not there:
        raise ValueError(
            "There is no GPU that torch can use: the accelerator gpu was given, and torch "
            f"{torch.__version__} sees no CUDA device. Give cpu or auto, or look at "
            "`lightning-kv doctor`."
        )
    if accelerator != "auto":
        return accelerator
    return "gpu" if there else "cpu"


def launched(options: TrainerOptions) -> TrainerOptions:
    """Trainer settings that agree with the launcher, with nothing left open.

    A Trainer does not read what `fabric run` and torchrun were told, and would run a whole job in
    every process. Under a launcher its word counts; settings that contradict it are refused.

    Raises:
        ValueError: A setting contradicts the launcher, or is out of range.
    """
    told, source = _told()
    _agree(options, told, source)
    asked = os.environ.get("LT_STRATEGY", "auto")
    if source and options.strategy is not None and asked not in ("auto", options.strategy):
        raise ValueError(
            f"--trainer.strategy {options.strategy} contradicts the launcher, which says {asked}. "
            "Leave --trainer.strategy out, or change what the launcher is given."
        )
    settings = replace(options, **told)
    settings.accelerator = resolved(settings.accelerator)
    settings.devices = 1 if settings.devices is None else settings.devices
    settings.num_nodes = 1 if settings.num_nodes is None else settings.num_nodes
    for name in ("devices", "num_nodes"):
        value = getattr(settings, name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--trainer.{name} {value} starts no process. Use 1 or more.")
    return settings


def alone(options: TrainingTrainerOptions) -> TrainingTrainerOptions:
    """Trainer settings of a training, which runs in one process on one device.

    Raises:
        ValueError: The launcher starts more processes, says another device, or there is none.
    """
    told, source = _told()
    if under_launcher():
        processes = int(os.environ.get("WORLD_SIZE", "1"))
    else:
        processes = told.get("devices", 1) * told.get("num_nodes", 1)
    if processes > 1:
        raise ValueError(
            f"A training runs on one device: {source} starts {processes} processes, and each would "
            "train alone into the same --out. Start one."
        )
    _agree(options, {name: told[name] for name in ("accelerator",) if name in told}, source)
    return replace(options, accelerator=resolved(told.get("accelerator", options.accelerator)))


def _agree(options: Settings, told: dict[str, int | str], source: str) -> None:
    """Refuse settings that contradict the launcher."""
    for name, value in told.items():
        own = getattr(options, name)
        if own not in (None, "auto", value):
            raise ValueError(
                f"--trainer.{name} {own} contradicts {source}, which says {value}. "
                f"Leave --trainer.{name} out, or change what {source} is given."
            )


def _told() -> tuple[dict[str, int | str], str]:
    """Settings that a launcher implies, and its name."""
    env = os.environ.get
    if under_launcher():
        local, world = int(env("LOCAL_WORLD_SIZE", "1")), int(env("WORLD_SIZE", "1"))
        asked = env("LT_DEVICES", "auto")
        devices = str(local) if asked in ("auto", "-1") else asked
        told = {
            "devices": int(devices) if devices.isdigit() else devices,
            "num_nodes": world // local,
        }
        accelerator = env("LT_ACCELERATOR", "auto")
        if accelerator != "auto":
            told["accelerator"] = "gpu" if accelerator == "cuda" else accelerator
        if env("LT_PRECISION"):
            raise ValueError(
                f"`fabric run --precision {env('LT_PRECISION')}` would be ignored: a model runs in "
                "the precision of its weights. Leave --precision out."
            )
        return told, "the launcher"
    if _under_srun():
        nodes = int(env("SLURM_NNODES", "1"))
        tasks = env("SLURM_NTASKS_PER_NODE") or str(int(env("SLURM_NTASKS", "1")) // nodes)
        return {"devices": int(tasks), "num_nodes": nodes}, "srun"
    return {}, ""


def under_launcher() -> bool:
    """True where torchrun, or `fabric run` through it, has started the ranks already."""
    return "LOCAL_WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def _under_srun() -> bool:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.detect()


def is_first() -> bool:
    """Whether this is rank 0, before any process group exists."""
    if under_launcher():
        return os.environ.get("RANK", "0") == "0"
    if _under_srun():
        return os.environ.get("SLURM_PROCID", "0") == "0"
    return os.environ.get("LOCAL_RANK", "0") == os.environ.get("NODE_RANK", "0") == "0"


def trainer_for(
    settings: Settings, callbacks: list[Callback], bar: ProgressBar, out: Path, **given: Any
) -> Trainer:
    """A Trainer as its settings say; what it writes or shows is ours, and below ``out``.

    Args:
        settings: As :func:`launched` or :func:`alone` fills them in: their names are the Trainer's.
        callbacks: Ours; those of the settings come after them.
        bar: Ours, where no callback is a progress bar.
        out: Run directory, which loggers and profilers write below.
        given: What else the Trainer is given; a logger here counts instead of the settings'.

    Raises:
        ValueError: A class cannot be found or made, or the Trainer refuses an argument.
    """
    from lightning import Callback, Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ProgressBar

    told = {name: value for name, value in vars(settings).items() if value is not None}
    own = [instance(each, Callback, "--trainer.callbacks") for each in settings.callbacks or ()]
    plugins = [instance(x, object, "--trainer.plugins") for x in told.get("plugins", ())]
    bars = [] if any(isinstance(c, ProgressBar) for c in [*callbacks, *own]) else [bar]
    loggers = () if "logger" in given else settings.logger or ()
    made = {
        "callbacks": [*callbacks, *bars, *own],
        "plugins": plugins or None,
        "strategy": strategy_of(told.get("strategy", "auto")),
        "profiler": profiler_of(settings.profiler, out),
        "logger": [logger_of(each, out) for each in loggers] or False,
        "default_root_dir": out,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    try:
        trainer = Trainer(**(told | made | given))
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(
            f"Lightning's Trainer refuses what it is given: {error} Given: {told}. Change the "
            "--trainer argument that it names, or leave it out."
        ) from error
    check_processes(trainer, told.get("strategy"))
    return trainer


def check_processes(trainer: Trainer, strategy: Any) -> None:
    """Refuse processes that never meet, or that keep to themselves what they found.

    Raises:
        ValueError: The Trainer would start such.
    """
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"--trainer.strategy {strategy} works in processes that end before anybody can "
            "show what they found. Use ddp."
        )
    found = getattr(trainer.strategy, "cluster_environment", None)
    if (
        trainer.num_nodes > 1
        and isinstance(found, LightningEnvironment)
        and not {"MASTER_ADDR", "NODE_RANK"} <= set(os.environ)
    ):
        raise ValueError(
            f"--trainer.num_nodes {trainer.num_nodes} would wait for other machines: nothing says "
            "where they meet. Start all with torchrun, fabric run or srun, or set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK on each."
        )


def strategy_of(spec: dict[str, Any] | str) -> Any:
    """A strategy by Lightning's name, or of a class."""
    from lightning.pytorch.strategies import Strategy

    return instance(spec, Strategy, "--trainer.strategy") if is_address(spec) else spec


def profiler_of(spec: dict[str, Any] | str | None, out: Path) -> Profiler | str | None:
    """A profiler by name or class; ours write into the run directory.

    Raises:
        ValueError: There is no such profiler.
    """
    from lightning.pytorch import profilers

    ours = {"simple": profilers.SimpleProfiler, "advanced": profilers.AdvancedProfiler}
    if spec in (None, *ours):
        return spec and ours[spec](dirpath=str(out), filename="profile")
    _check_word(spec, ours, "--trainer.profiler")
    return instance(spec, profilers.Profiler, "--trainer.profiler", {"dirpath": str(out)})


def logger_of(spec: dict[str, Any] | str, out: Path, versions: bool = False) -> Logger:
    """A logger by name or class, which writes below a run directory.

    Args:
        spec: ``csv``, ``tensorboard``, or the address of another class.
        out: The run directory; given where the class takes ``save_dir``.
        versions: A CSV file for each call that a run took; the last one alone otherwise.

    Raises:
        ValueError: There is no such logger.
    """
    from lightning.pytorch import loggers

    if spec == "csv" and versions:
        return loggers.CSVLogger(out, name="log", flush_logs_every_n_steps=10)
    if spec == "csv":
        return loggers.CSVLogger(out, name="", version="log")
    if spec == "tensorboard":
        spec = "lightning.pytorch.loggers:TensorBoardLogger"
    _check_word(spec, ("csv", "tensorboard"), "--trainer.logger")
    return instance(spec, loggers.Logger, "--trainer.logger", {"save_dir": str(out)})


def _check_word(spec: dict[str, Any] | str, known: Iterable[str], option: str) -> None:
    """Refuse a word that is no address of a class, and none that we know.

    Raises:
        ValueError: It is such.
    """
    if not is_address(spec):
        raise ValueError(
            f"{option} {spec!r} is not known.{hint(spec, known)} Give {', '.join(known)}, or a "
            "class as package.module:Class."
        )


def device_of(accelerator: str) -> str:
    """The torch device of an accelerator.

    Raises:
        ValueError: There is none.
    """
    return "cuda" if resolved(accelerator) == "gpu" else "cpu"
