"""What a run's numbers depend on: its fingerprint, and what a report is told of it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch

import lightning_kv
from lightning_kv.metrics.backbones.weights import checksum
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.plugins import sources
from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.measuring.clip_module import ClipModule
from lightning_kv.tasks.measuring.real_videos import on_disk
from lightning_kv.tasks.videos import GAIN


def describe(trainer: L.Trainer, module: ClipModule, data: Any) -> dict[str, Any]:
    """Everything the numbers depend on: the run's fingerprint is made of it."""
    files = {key: on_disk(video) for key, video in module.real.items()}
    sums = {path: checksum(path) for path in set(files.values())}  # a shard holds many
    return {
        **module.describe(),
        "data": data.describe(),
        "metrics": module.suite.recipes(),
        "real": {key: sums[path] for key, path in files.items()},
        **surroundings(trainer),
    }


def surroundings(trainer: L.Trainer) -> dict[str, Any]:
    """What else decides the last digits: threads, device, precision and software."""
    return {
        "threads": torch.get_num_threads(),
        "accelerator": trainer.strategy.root_device.type,
        **({} if trainer.precision == "32-true" else {"trainer_precision": trainer.precision}),
        "versions": versions(),
    }


def plugged(policies: Iterable[CachePolicy]) -> dict[str, Any]:
    """Checksums of the modules of other packages that bring parts; they decide as much as ours."""
    found = sources(part for policy in policies for part in policy.parts)
    return {"modules": found} if found else {}


def about(trainer: L.Trainer, module: ClipModule, data: Any) -> dict[str, Any]:
    """What a report must know that has only the run directory (``tasks/report.py``)."""
    told = module.about()
    told["run"] |= {
        **data.about(),
        "difference_gain": GAIN,
        "device": str(trainer.strategy.root_device),
        "versions": versions() | {"python": platform.python_version()},
    }
    return {"reference": module.reference_name, "metrics": module.facts()} | told


def versions() -> dict[str, str]:
    """Of this package and of torch."""
    return {"lightning_kv": lightning_kv.__version__, "torch": torch.__version__}


def weights_of(model: VideoModel) -> str:
    """What tells a model's weights from others in a file of curves.

    Text states and VAE are left out: other prompts have states of their own.
    """
    source = {name: mark for name, mark in model.source.items() if name not in ("text", "vae")}
    told = {"source": source, "config": model.network.config.to_dict()}
    return f"sha256:{fingerprint(told)}"
