"""What started this process: plain python, `fabric run`, torchrun or srun."""

from __future__ import annotations

import os
from dataclasses import replace

from lightning_kv.tasks.options import TrainerOptions


def under_launcher() -> bool:
    """True where another program has started the ranks already."""
    return "LOCAL_WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def launched(options: TrainerOptions) -> TrainerOptions:
    """Trainer settings that agree with the launcher.

    A Trainer does not read what `fabric run` and torchrun were told, and would run a whole job in
    every process. Under a launcher its word counts; settings that contradict it are refused.

    Raises:
        ValueError: ``devices`` or ``num_nodes`` were set to something else than the launcher's.
    """
    env = os.environ.get
    default = TrainerOptions()
    if under_launcher():
        local, world = int(env("LOCAL_WORLD_SIZE", "1")), int(env("WORLD_SIZE", "1"))
        asked = env("LT_DEVICES")
        devices = asked if asked not in (None, "auto", "-1") else local
        devices = int(devices) if str(devices).isdigit() else devices
        found = TrainerOptions(devices, env("LT_ACCELERATOR", options.accelerator), world // local)
        source = "the launcher"
    elif _under_srun():
        nodes = int(env("SLURM_NNODES", "1"))
        tasks = env("SLURM_NTASKS_PER_NODE") or str(int(env("SLURM_NTASKS", "1")) // nodes)
        found = TrainerOptions(int(tasks), options.accelerator, nodes)
        source = "srun"
    else:
        return options
    for name in ("devices", "num_nodes"):
        own = getattr(options, name)
        if own not in (getattr(default, name), getattr(found, name)):
            raise ValueError(
                f"--trainer.{name} {own} contradicts {source}, which has started "
                f"{getattr(found, name)}. Leave --trainer.{name} out, or change the launcher's."
            )
    return replace(options, **vars(found))


def _under_srun() -> bool:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.detect()


def global_rank() -> int:
    """Rank of this process, before any process group exists."""
    for name in ("RANK", "SLURM_PROCID") if under_launcher() or _under_srun() else ():
        if name in os.environ:
            return int(os.environ[name])
    local, node = os.environ.get("LOCAL_RANK", "0"), os.environ.get("NODE_RANK", "0")
    return int(local) + int(node) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
