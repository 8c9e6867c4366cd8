"""One video from a prompt alone, with prompt switches on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from lightning_kv.cache.decisions import Event
from lightning_kv.data.panorama import PanoramaPrompt
from lightning_kv.models.loading import load_model
from lightning_kv.models.video import VideoModel
from lightning_kv.models.samplers import ChunkPlan
from lightning_kv.models.wan import WanConfig
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.presets import load_policy
from lightning_kv.report.table import format_bytes
from lightning_kv.report.video import write_mp4
from lightning_kv.rollout import Rollout, rollout
from lightning_kv.tasks.launch import resolved
from lightning_kv.tasks.options import GenerateOptions
from lightning_kv.tasks.progress import RolloutProgress
from lightning_kv.tasks.results import broken, picture

PIXEL_FRAMES = 1  # per latent frame: the patch codec does not compress time
WIDTH = 320  # pixels that a video is enlarged to, about


@dataclass(frozen=True)
class Switch:
    """Another prompt on the way.

    Args:
        prompt: From here on.
        asked: Second that was asked for.
        frame: Latent frame where it comes: the first of the chunk that the second falls into.
    """

    prompt: str
    asked: float
    frame: int

    @property
    def event(self) -> Event:
        """What a rollout is told."""
        return Event("prompt_switch", self.frame, self.prompt)


@dataclass(frozen=True)
class Generated:
    """A video and what it cost.

    Args:
        out: The file.
        policy: Name of the policy.
        frames: Pixel frames.
        fps: Frames per second of the video.
        took: Seconds of generation, loading and writing left out.
        peak_bytes: Most bytes that the cache held.
        rows_read: History rows read.
        rows_all: The same if every pass had read the whole history.
        rows_scored: History rows touched only to score them.
        rebuilt_frames: Past frames that were encoded again, as a policy may answer a switch.
        notes: What was rounded or may fail, in sentences.
    """

    out: Path
    policy: str
    frames: int
    fps: float
    took: float
    peak_bytes: int
    rows_read: int
    rows_all: int
    rows_scored: int
    rebuilt_frames: int
    notes: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """What was made and what it cost, in lines."""
        share = f"{100 * self.rows_read / self.rows_all:.0f} %" if self.rows_all else "none"
        scored = f", {self.rows_scored:,} more only scored" if self.rows_scored else ""
        rebuilt = f", {self.rebuilt_frames} frames encoded again" if self.rebuilt_frames else ""
        length = f"{self.frames} frames, {self.frames / self.fps:g} s at {self.fps:g} frames/s"
        rate = f"{self.frames / self.took:.1f} frames/s"
        return [
            f"{self.out}: {length}",
            f"policy      {self.policy}",
            f"generation  {self.took:.1f} s ({rate})",
            f"KV peak     {format_bytes(self.peak_bytes)}",
            f"rows read   {self.rows_read:,} of {self.rows_all:,} ({share}){scored}{rebuilt}",
        ]


def generate(options: GenerateOptions) -> Generated:
    """Roll a prompt out under a policy and write the video.

    Raises:
        ValueError: Anything that does not fit, before anything is generated.
    """
    check_out(options.out, options.force)
    check_numbers(options)
    torch.set_num_threads(options.threads)
    policy = read_policy(options.policy)
    model = load_model(options.model, "cuda" if resolved(options.accelerator) == "gpu" else "cpu")
    config = model.network.config
    PanoramaPrompt.parse(options.prompt)
    frames = latent_frames(options.seconds, options.fps, config.chunk)
    switches = read_switches(options.switches, frames, options.fps, config.chunk)
    made, took = run(options, model, policy, frames, switches)
    if failure := broken(made, made, 0):
        raise ValueError(
            f"The rollout under {policy.name!r} broke down: {failure}. No video is written; try "
            "another policy or budget."
        )
    pixels = picture(made.frames[0])
    scale = max(1, round(WIDTH / pixels.shape[2]))
    write_mp4(options.out, pixels.repeat(scale, axis=1).repeat(scale, axis=2), options.fps)
    cost = made.costs[0]
    return Generated(
        out=options.out,
        policy=policy.name,
        frames=len(pixels),
        fps=options.fps,
        took=took,
        peak_bytes=cost.peak_bytes,
        rows_read=cost.rows_read,
        rows_all=all_rows(config, frames),
        rows_scored=cost.rows_scored,
        rebuilt_frames=cost.rebuilt_frames,
        notes=tuple(notes(options, config, frames, switches)),
    )


def run(
    options: GenerateOptions,
    model: VideoModel,
    policy: CachePolicy,
    frames: int,
    switches: Sequence[Switch],
) -> tuple[Rollout, float]:
    """The rollout behind a progress line, and its seconds."""
    chunk = model.network.config.chunk
    began = time.perf_counter()
    with RolloutProgress(1, ChunkPlan(frames, chunk).count, chunk, visible=True) as progress:
        progress.begin(policy.name, 1)
        made = rollout(
            model,
            policy,
            options.prompt,
            frames,
            seed=options.seed,
            events=[switch.event for switch in switches],
            progress=progress.chunk,
        )
    return made, time.perf_counter() - began


def check_out(out: Path, force: bool) -> None:
    """Refuse a file that cannot or must not be written.

    Raises:
        ValueError: It is no .mp4, its folder is missing, or it exists.
    """
    if out.suffix.lower() != ".mp4":
        raise ValueError(
            f"A video is written as .mp4, and {str(out)!r} does not end so. "
            f"Give -o {out.with_suffix('.mp4') if out.name else 'out.mp4'}."
        )
    if not out.parent.is_dir():
        raise ValueError(
            f"No folder {out.parent} to write {out.name} into. Make it first, or give another -o."
        )
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(
            f"{out} exists and would be lost. Give another -o, or --force to replace a file."
        )


def check_numbers(options: GenerateOptions) -> None:
    """Refuse times that make no video.

    Raises:
        ValueError: Says which number.
    """
    for name, unit in (("seconds", "seconds"), ("fps", "frames per second")):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} {value:g} makes no video. Give {unit} above 0, such as 8.")
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads} leaves nobody to work. Use 1 or more.")
    if options.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("--accelerator gpu: there is no CUDA GPU here. Use cpu or auto.")


def read_policy(text: str) -> CachePolicy:
    """A policy from a name, a YAML file, or parts in place (``{name: ..., retain: ...}``).

    Raises:
        ValueError: There is no such policy.
    """
    if not text.lstrip().startswith("{"):
        return load_policy(text)
    try:
        return load_policy(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(
            f"--policy {text!r} is no YAML mapping: {error}. Write it as "
            "'{name: mine, retain: {part: window, budget: 6f}}'."
        ) from error


def latent_frames(seconds: float, fps: float, chunk: int) -> int:
    """Latent frames of a video, whole chunks.

    >>> latent_frames(2.5, 8, 3)
    21
    """
    wanted = math.ceil(round(seconds * fps / PIXEL_FRAMES, 6))
    return math.ceil(wanted / chunk) * chunk


def read_switch(text: str) -> tuple[str, float]:
    """Prompt and second of ``TEXT@SECONDS``.

    Raises:
        ValueError: No time, or an unreadable prompt.
    """
    prompt, mark, when = (part.strip() for part in text.rpartition("@"))
    try:
        moment = float(when)
    except ValueError:
        moment = math.nan
    if not mark or not math.isfinite(moment):
        raise ValueError(
            f"--prompt {text!r} does not say when. It switches the prompt on the way and reads "
            "TEXT@SECONDS, such as 'night fast n13 left@3'."
        )
    PanoramaPrompt.parse(prompt)
    return prompt, moment


def read_switches(texts: Sequence[str], frames: int, fps: float, chunk: int) -> list[Switch]:
    """Prompt switches, each at the first frame of the chunk that its time falls into.

    Args:
        texts: ``TEXT@SECONDS``.
        frames: Latent frames of the video.
        fps: Pixel frames per second.
        chunk: Latent frames per chunk.

    Raises:
        ValueError: No time, an unreadable prompt, a time in the first chunk or beyond the end, or
            two in one chunk.
    """
    length, first = (n * PIXEL_FRAMES / fps for n in (frames, chunk))
    found: dict[int, Switch] = {}
    for text in texts:
        prompt, moment = read_switch(text)
        frame = math.floor(round(moment * fps / PIXEL_FRAMES, 6)) // chunk * chunk
        if not 0 < frame < frames:
            where = "beyond the end" if frame > 0 else "in the first chunk"
            raise ValueError(
                f"--prompt {text!r} switches {where}: the video is {length:g} s long and a switch "
                f"comes at the start of a later chunk. Give a time from {first:g} to below "
                f"{length:g} seconds, or a longer video."
            )
        if frame in found:
            raise ValueError(
                f"Two prompt switches in one chunk: {found[frame].prompt!r} and {prompt!r} would "
                f"both come at {frame * PIXEL_FRAMES / fps:g} s. Put {first:g} s or more between "
                "them."
            )
        found[frame] = Switch(prompt, moment, frame)
    return [found[frame] for frame in sorted(found)]


def all_rows(config: WanConfig, frames: int) -> int:
    """History rows that the passes of a rollout would read if they read all of it."""
    tokens = config.geometry().tokens
    rows = sum(start * tokens for start in range(0, frames, config.chunk))
    passes = len(config.timesteps) + 1  # and the commit pass
    return rows * passes * config.chunk * tokens * config.layers * config.heads


def notes(
    options: GenerateOptions, config: WanConfig, frames: int, switches: Sequence[Switch]
) -> list[str]:
    """What the user should know: times that were rounded, lengths that the model never saw."""
    said, made = [], frames * PIXEL_FRAMES / options.fps
    if not math.isclose(made, options.seconds):
        said.append(
            f"{options.seconds:g} s became {made:g} s: {frames} latent frames, in whole chunks of "
            f"{config.chunk}."
        )
    for switch in switches:
        start = switch.frame * PIXEL_FRAMES / options.fps
        if not math.isclose(start, switch.asked):
            said.append(
                f"The switch to {switch.prompt!r} at {switch.asked:g} s comes at {start:g} s, with "
                "the first frame of its chunk."
            )
    if frames > config.train_horizon:
        said.append(
            f"{frames} frames exceed the {config.train_horizon} that {options.model} was trained "
            "for: later frames may fail."
        )
    return said
