"""From ``--trainer.*`` and the launcher (python, fabric run, torchrun, srun) to a Trainer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_kv.tasks.class_paths import instance, is_address
from lightning_kv.tasks.options import TrainerOptions

if TYPE_CHECKING:  # it takes seconds
    from lightning import Callback, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler


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
    for name, value in told.items():
        own = getattr(options, name)
        if own not in (None, "auto", value):
            raise ValueError(
                f"--trainer.{name} {own} contradicts {source}, which says {value}. "
                f"Leave --trainer.{name} out, or change what {source} is given."
            )
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


def trainer_for(settings: TrainerOptions, callbacks: list[Callback], out: Path) -> Trainer:
    """A Trainer that only runs; what it would write or show is ours.

    Args:
        settings: As :func:`launched` fills them in.
        callbacks: Ours; those of the settings come after them.
        out: Run directory, which loggers and profilers write below.

    Raises:
        ValueError: A class cannot be found or made, or the Trainer refuses an argument.
    """
    from lightning import Callback, Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.strategies import Strategy

    own = [instance(each, Callback, "--trainer.callbacks") for each in settings.callbacks or ()]
    plugins = [instance(each, object, "--trainer.plugins") for each in settings.plugins or ()]
    strategy = settings.strategy or "auto"
    if is_address(strategy):
        strategy = instance(strategy, Strategy, "--trainer.strategy")
    given = {
        "strategy": strategy,
        "precision": settings.precision,
        "profiler": profiler_of(settings.profiler, out),
        "plugins": plugins or None,
        "limit_test_batches": settings.limit_test_batches,
        "deterministic": settings.deterministic,
        "benchmark": settings.benchmark,
        "inference_mode": settings.inference_mode,
        "logger": [logger_of(each, out) for each in settings.logger or ()] or False,
    }
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            callbacks=[*callbacks, *own],
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **given,
        )
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        told = {name: value for name, value in vars(settings).items() if value is not None}
        raise ValueError(
            f"Lightning's Trainer refuses what it is given: {error} Given: {told}. Change the "
            "--trainer argument that it names, or leave it out."
        ) from error


def profiler_of(spec: dict[str, Any] | str | None, out: Path) -> Profiler | str | None:
    """A profiler by name or class; ours write into the run directory."""
    from lightning.pytorch import profilers

    ours = {"simple": profilers.SimpleProfiler, "advanced": profilers.AdvancedProfiler}
    if spec in (None, *ours):
        return spec and ours[spec](dirpath=str(out), filename="profile")
    return instance(spec, profilers.Profiler, "--trainer.profiler", {"dirpath": str(out)})


def logger_of(spec: dict[str, Any] | str, out: Path) -> Logger:
    """A logger by name or class, which writes below a run directory.

    Args:
        spec: ``csv``, ``tensorboard``, or the address of another class.
        out: The run directory; given where the class takes ``save_dir``.

    Raises:
        ValueError: There is no such logger.
    """
    from lightning.pytorch import loggers

    if spec == "csv":
        return loggers.CSVLogger(out, name="", version="log")
    if spec == "tensorboard":
        spec = "lightning.pytorch.loggers:TensorBoardLogger"
    return instance(spec, loggers.Logger, "--trainer.logger", {"save_dir": str(out)})


def device_of(accelerator: str) -> str:
    """The torch device of an accelerator.

    Raises:
        ValueError: There is none.
    """
    return "cuda" if resolved(accelerator) == "gpu" else "cpu"
