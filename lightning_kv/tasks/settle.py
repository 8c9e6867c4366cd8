"""Settings of an evaluation that depend on its model, filled in and checked."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

from lightning_kv.cache.kernels import known_backend
from lightning_kv.cache.record import recorders
from lightning_kv.cache.recorder import Clip
from lightning_kv.metrics import Suite
from lightning_kv.models.embeddings import INDEX
from lightning_kv.models.sources import Source
from lightning_kv.models.wan import WanConfig
from lightning_kv.policies.base import CachePolicy
from lightning_kv.runs.words import format_bytes
from lightning_kv.tasks.choices import needs_of
from lightning_kv.tasks.clock import read_size
from lightning_kv.tasks.launch import is_first
from lightning_kv.tasks.options import EvaluateOptions

log = logging.getLogger(__name__)

FAST_PANS = Path("data/panorama-fast13")


def settled(options: EvaluateOptions, source: Source) -> EvaluateOptions:
    """What was not given, as the model wants it.

    Raises:
        ValueError: No prompts are given, and the model has none of its own.
    """
    world, config = source.config is None, source.config
    if options.data.shards is None and not world:
        raise ValueError(
            f"Nothing says which prompts to give to {source.name!r}. Use --data.shards FOLDER; "
            "`lightning-kv encode prompts.txt --out FOLDER` makes one."
        )
    shards = options.data.shards or FAST_PANS
    own = shards if not world and (shards / INDEX).is_file() else None
    defaults = {
        "frames": 72 if world else config.train_horizon,
        "context_frames": 15 if world else 0,
        "fps": 8 if world else config.fps,
        "text": own,
        "precision": "float32" if world else "reference",
        "metrics": list(Suite(None, known(source, options)).choices),
    }
    missing = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return replace(options, data=replace(options.data, shards=shards), **missing)


def known(source: Source, options: EvaluateOptions) -> set[str]:
    """What metrics can know of a clip of this run."""
    found = {"latents", "reference_latents", "attention", "prompt", "fps"}
    if options.decode:
        found |= {"pixels", "reference_pixels"}
    return found | ({"scene"} if source.config is None else set())


def check_text(options: EvaluateOptions, source: Source) -> None:
    """Refuse a text encoder: every process would hold it, and encode every prompt again.

    Raises:
        ValueError: The text states are not on disk.
    """
    folder = options.text or source.text
    if folder is None or not (folder / INDEX).is_file():
        raise ValueError(
            f"The prompts in {options.data.shards} have no text states, and an evaluation runs no "
            f"text encoder. Type `lightning-kv encode {options.data.shards}` first, or give --text "
            "FOLDER that it wrote."
        )


def check_negative(negative: str, model: str, config: WanConfig) -> None:
    """Refuse a negative prompt that nothing would read.

    Raises:
        ValueError: The model runs without guidance.
    """
    if negative and config.guidance == 1:
        raise ValueError(
            f"--negative {negative!r} does nothing: {model!r} runs without guidance. Leave it "
            "out, or use a model file with `guidance:` above 1."
        )


def check_tables(options: EvaluateOptions, config: WanConfig, policies: list[CachePolicy]) -> None:
    """Say what the reference tables take, and refuse those that take too much.

    Raises:
        ValueError: One is larger than its limit, or nobody records it.
    """
    geometry = config.geometry(read_size(options.size, config))
    count = config.plan(options.frames, options.context_frames).count
    clip = Clip(None, 0, options.frames, count, geometry, config.passes)
    for recorder in recorders(needs_of(policies)):
        recorder.begin([clip])
        size = format_bytes(recorder.size(clip))
        log.info("The reference rollout records %s: %s per clip.", recorder.name, size)


def check_options(
    options: EvaluateOptions, config: WanConfig, world: bool, policies: list[CachePolicy]
) -> None:
    """Refuse kernel, frames and budgets that do not work, before anything is written.

    Raises:
        ValueError: The first that does not.
    """
    known_backend(options.backend)
    check_negative(options.negative, options.model, config)
    if options.context_frames and not world:
        raise ValueError(
            f"--context_frames {options.context_frames} gives frames of the panorama world, and "
            f"{options.model!r} has none to give. Use 0."
        )
    config.plan(options.frames, options.context_frames)
    if options.videos is not None and options.videos < 0:
        raise ValueError(
            f"--videos {options.videos} is no number of prompts. Use 0 for none, or leave it out "
            "for all."
        )
    geometry = config.geometry(read_size(options.size, config))
    for policy in policies:
        policy.check(geometry, config.chunk, options.frames)
    check_tables(options, config, policies)
    if options.frames > config.train_horizon and is_first():
        warnings.warn(
            f"{options.frames} frames exceed the {config.train_horizon} that {options.model} was "
            "trained for: the reference itself may fail.",
            stacklevel=2,
        )
