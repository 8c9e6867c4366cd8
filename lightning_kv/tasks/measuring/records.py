"""From rollouts to the numbers of a record, and what a run's numbers depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

import lightning_kv
from lightning_kv.metrics.backbones.weights import checksum
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.plugins import sources
from lightning_kv.rollout import Rollout
from lightning_kv.runs.directory import Record
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.measuring.real_videos import on_disk
from lightning_kv.tasks.videos import GAIN


def broken(out: Rollout, reference: Rollout, index: int) -> str | None:
    """Why a clip cannot be measured; None where it can."""
    for whose, rollouts in (("the", out), ("the reference's", reference)):
        for what, made in (("latents", rollouts.latents), ("pixels", rollouts.frames)):
            bad = None if made is None else ~made[index].isfinite().flatten(1).all(1)
            if bad is not None and bool(bad.any()):
                return f"{whose} {what} are not finite from frame {int(bad.float().argmax())} on"
    return None


def cost(out: Rollout, reference: Rollout, index: int) -> dict[str, Any]:
    """What one clip cost; reads as a share of the reference's. Seconds are the whole batch's."""
    own, base = out.costs[index], reference.costs[index].rows_read
    return {
        "kv_bytes_peak": own.peak_bytes,
        "kv_bytes_mean": sum(own.chunk_bytes) / len(own.chunk_bytes),
        "kv_rows_read": own.rows_read,
        "kv_rows_scored": own.rows_scored,
        "kv_read_fraction": own.rows_read / base if base else None,
        "kv_scored_fraction": own.rows_scored / base if base else None,
        "kv_rebuilt_frames": own.rebuilt_frames,
        "seconds_per_chunk": out.seconds_per_chunk,
    }


def record_of(clip: ClipResult) -> Record:
    """The record line of a clip, see :mod:`lightning_kv.runs.directory`."""
    measured = clip.measured
    return {
        "policy": clip.name,
        "key": clip.key,
        "unit": clip.unit,
        "sample": clip.sample,
        "prompt": clip.prompt,
        **clip.extra,
        "cost": clip.cost,
        "metrics": measured.values,
        "curves": {name: plain(curve) for name, curve in measured.curves.items()},
        "failure": clip.failure,
        "problems": measured.problems,
    }


def plain(curve: Tensor) -> list[float | None]:
    """A curve as JSON has it: null where there is no value."""
    return [None if value != value else value for value in curve.tolist()]


def describe(trainer: L.Trainer, module: ClipModule, data: Any) -> dict[str, Any]:
    """Everything the numbers depend on: the run's fingerprint is made of it."""
    files = {key: on_disk(video) for key, video in module.real.items()}
    sums = {path: checksum(path) for path in set(files.values())}  # a shard holds many
    return {
        **module.describe(),
        "data": data.describe(),
        "metrics": module.suite.recipes(),
        "real": {key: sums[path] for key, path in files.items()},
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
    """What a report must know that has only the run directory; see :mod:`overview`."""
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
