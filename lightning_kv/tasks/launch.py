"""What started this process: plain python, `fabric run`, torchrun or srun."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_kv.tasks.options import TrainerOptions

if TYPE_CHECKING:  # it takes seconds
    from lightning import Callback, Trainer
    from lightning.pytorch.loggers import Logger


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


def trainer_for(
    settings: TrainerOptions, callbacks: list[Callback], logger: Logger | bool = False
) -> Trainer:
    """A Trainer that only runs; what it would write or show is ours."""
    from lightning import Trainer

    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def logger_of(name: str | None, out: Path) -> Logger | bool:
    """A logger by name, which writes below a run directory.

    Args:
        name: ``csv``, ``tensorboard``, or the address ``package.module:Class`` of another, which
            is made with ``save_dir``.
        out: The run directory.

    Raises:
        ValueError: There is no such logger.
    """
    from lightning.pytorch import loggers

    if name is None:
        return False
    if name == "csv":
        return loggers.CSVLogger(out, name="", version="log")
    module, _, kind = (
        name if name != "tensorboard" else "lightning.pytorch.loggers:TensorBoardLogger"
    ).partition(":")
    try:
        found = getattr(import_module(module), kind)
        made = found(save_dir=str(out))
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"--trainer.logger {name} is no logger that can be made ({type(error).__name__}: "
            f"{error}). Give csv, tensorboard, or package.module:Class of one that takes save_dir."
        ) from error
    if not isinstance(made, loggers.Logger):
        raise ValueError(
            f"--trainer.logger {name} is a {type(made).__name__} and no logger of Lightning. Give "
            "csv, tensorboard, or package.module:Class of one."
        )
    return made
