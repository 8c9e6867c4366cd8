"""From rollouts to the numbers of a record, and what a run's numbers depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import lightning_kv
from lightning_kv.data.datamodule import PromptData
from lightning_kv.metrics import Clip, Suite
from lightning_kv.metrics.backbones.weights import checksum
from lightning_kv.metrics.base import noting
from lightning_kv.models.samplers import NOISE_REVISION
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.plugins import sources
from lightning_kv.policies.registry import policy_to_dict
from lightning_kv.rollout import Rollout
from lightning_kv.tasks.film import GAIN
from lightning_kv.tasks.options import EvaluateOptions


def broken(out: Rollout, reference: Rollout, index: int) -> str | None:
    """Why a clip cannot be measured; None where it can."""
    for whose, rollouts in (("the", out), ("the reference's", reference)):
        bad = ~rollouts.latents[index].isfinite().flatten(1).all(1)
        if bool(bad.any()):
            return f"{whose} latents are not finite from frame {int(bad.float().argmax())} on"
    return None


def picture(pixels: Tensor) -> np.ndarray:
    """Pixels ``[F, 3, H, W]`` in [0, 1] as uint8 ``[F, H, W, 3]``; what is not finite is black."""
    shown = (255 * pixels.nan_to_num(0)).round().byte()
    return shown.permute(0, 2, 3, 1).cpu().numpy()


def fitted(pixels: Tensor, width: int = 320) -> np.ndarray:
    """A picture of at most ``width`` pixels: larger ones are averaged over whole blocks."""
    block = -(-pixels.shape[-1] // width)
    return picture(avg_pool2d(pixels, block) if block > 1 else pixels)


def measure(
    metrics: nn.ModuleDict, clip: Clip, problems: dict[str, str] | None = None
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Update each metric with a clip; its value and curve over time (null where it has none).

    Args:
        metrics: By name.
        clip: The clip; a metric that needs what it lacks has no value.
        problems: Where given, takes up why a metric cannot judge this clip, by name; the others
            go on.

    Raises:
        ValueError: A metric cannot judge this clip, and ``problems`` is not given.
    """
    values, curves = dict.fromkeys(metrics), {name: [] for name in metrics}
    for name, metric in metrics.items():
        if any(getattr(clip, need) is None for need in metric.needs):
            continue
        with noting(problems, name):
            curve = metric.curve(clip)
            metric.update(clip, curve)
            values[name] = metric.value(curve)
            curves[name] = [None if x != x else x for x in curve.tolist()]
    return values, curves


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


def describe(
    options: EvaluateOptions,
    policies: dict[str, CachePolicy],
    reference: CachePolicy,
    model: VideoModel,
    data: PromptData,
    suite: Suite,
    real: Mapping[str, Path],
    accelerator: str,
) -> dict[str, Any]:
    """Everything the numbers depend on: the run's fingerprint is made of it."""
    return {
        "model": options.model,
        "source": model.source,
        "config": model.network.config.to_dict(),
        "policies": {name: policy_to_dict(policy) for name, policy in policies.items()},
        "reference": policy_to_dict(reference),
        **plugged([reference, *policies.values()]),
        "data": {
            "shards": [shard.sha256 for shard in data.index.shards],
            "seed": options.data.seed,
            "prompts": data.total,
        },
        "frames": options.frames,
        "context_frames": options.context_frames,
        "size": options.size,
        "fps": float(options.fps),
        "seed": options.seed,
        "noise_revision": NOISE_REVISION,
        "negative": options.negative,
        "decode": options.decode,
        "metrics": suite.recipes(),
        "real": {key: checksum(path) for key, path in real.items()},
        "batch": options.batch,
        "backend": options.backend,
        "threads": options.threads,
        "accelerator": accelerator,
        "versions": versions(),
    }


def plugged(policies: Iterable[CachePolicy]) -> dict[str, Any]:
    """Checksums of the modules of other packages that bring parts; they decide as much as ours."""
    found = sources(part for policy in policies for part in policy.parts)
    return {"modules": found} if found else {}


def about(
    options: EvaluateOptions,
    policies: dict[str, CachePolicy],
    reference: CachePolicy,
    model: VideoModel,
    prompts: int,
    suite: Suite,
    device: str,
) -> dict[str, Any]:
    """What a report must know that has only the run directory; see :mod:`overview`."""
    configs = {reference.name: policy_to_dict(reference)}
    configs |= {name: policy_to_dict(policy) for name, policy in policies.items()}
    shown = model.network.config.pixel_frames(options.frames)
    rate = options.fps if shown == options.frames else options.fps * options.frames / shown
    return {
        "reference": reference.name,
        "policies": configs,
        "metrics": suite.facts(),
        "run": {
            "prompts": prompts,
            "hindsight": [name for name, policy in policies.items() if policy.needs],
            "frames": options.frames,
            "pixel_frames": shown,
            "context_frames": options.context_frames,
            "rate": rate,
            "difference_gain": GAIN,
            "size": options.size,
            "seed": options.seed,
            "noise_revision": NOISE_REVISION,
            "data_seed": options.data.seed,
            "batch": options.batch,
            "device": device,
            "versions": versions() | {"python": platform.python_version()},
        },
        "model": {"name": options.model, **model.network.config.to_dict(), **model.source},
        "videos": prompts if options.videos is None else min(options.videos, prompts),
        "fps": options.fps,
    }


def versions() -> dict[str, str]:
    """Of this package and of torch."""
    return {"lightning_kv": lightning_kv.__version__, "torch": torch.__version__}
