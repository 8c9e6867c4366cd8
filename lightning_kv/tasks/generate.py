"""One video from a prompt alone, with prompt switches on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from lightning_kv.data.panorama import PanoramaPrompt
from lightning_kv.models.loading import load_model
from lightning_kv.models.samplers import NOISE_REVISION
from lightning_kv.models.sources import find_model
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import WanConfig
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import load_policy
from lightning_kv.rollout import Rollout, rollout
from lightning_kv.runs.video import write_mp4
from lightning_kv.tasks.options import GenerateOptions
from lightning_kv.tasks.progress import RolloutProgress
from lightning_kv.tasks.rollouts.latent_files import SUFFIX, write_latents
from lightning_kv.tasks.rollouts.lengths import FrameTimes, PromptSwitch, read_size, read_switches
from lightning_kv.tasks.rollouts.outcome import broken
from lightning_kv.tasks.rollouts.settings import check_negative
from lightning_kv.tasks.trainer import resolved
from lightning_kv.tasks.videos import enlarged
from lightning_kv.utilities.formatting import format_bytes, percent

LENGTH = 6.0  # seconds, where the model was trained for as many


@dataclass(frozen=True)
class Generated:
    """A video and what it cost.

    Args:
        out: The file.
        policy: Name of the policy.
        frames: Pixel frames.
        latent_frames: Latent frames.
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
    latent_frames: int
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
        share = percent(self.rows_read / self.rows_all) if self.rows_all else "none"
        scored = f", {self.rows_scored:,} more only scored" if self.rows_scored else ""
        rebuilt = f", {self.rebuilt_frames} frames encoded again" if self.rebuilt_frames else ""
        latent = "" if self.latent_frames == self.frames else f" ({self.latent_frames} latent)"
        length = (
            f"{self.frames} frames{latent}, {self.frames / self.fps:g} s at {self.fps:g} frames/s"
        )
        rate = f"{self.frames / self.took:.1f} frames/s"
        return [
            f"{self.out}: {length}",
            f"policy      {self.policy}",
            f"generation  {self.took:.1f} s ({rate})",
            f"KV peak     {format_bytes(self.peak_bytes)}",
            f"rows read   {self.rows_read:,} of {self.rows_all:,} ({share}){scored}{rebuilt}",
        ]


def generate(options: GenerateOptions) -> Generated:
    """Roll a prompt out under a policy and write the video, or its latents.

    Raises:
        ValueError: Anything that does not fit, before anything is generated.
    """
    check_out(options.out, options.force)
    check_numbers(options)
    torch.set_num_threads(options.threads)
    source = find_model(options.model)
    policy = read_policy(options.policy or source.policy)
    if policy.needs:
        raise ValueError(
            f"The policy {policy.name!r} needs {', '.join(policy.needs)} of a reference rollout of "
            "the same clip, and `generate` rolls out one clip only. Use `lightning-kv evaluate`."
        )
    if policy.inputs:
        raise ValueError(
            f"The policy {policy.name!r} needs the side input {', '.join(policy.inputs)} of every "
            "frame, and `generate` knows no camera. Use `lightning-kv evaluate` with the panorama, "
            "rollout(..., inputs={'pose': ...}) in Python, or a setting that does without, such as "
            "by: keys of world-kv."
        )
    # The embedded model's own file says its sizes, and is read in no time.
    model = model_for(options, []) if source.config is None else None
    config = source.config or model.network.config
    plan = Plan.of(options, config, PanoramaPrompt.parse if model else str)
    policy.check(config.geometry(plan.size), config.chunk, plan.frames)
    model = model or model_for(options, plan.prompts)
    made, took = run(options, model, policy, plan)
    frames, times = plan.frames, plan.times
    if failure := broken(made, made, 0):
        raise ValueError(
            f"The rollout under {policy.name!r} broke down: {failure}. No video is written; try "
            "another policy or budget."
        )
    write(options, model, made.latents[0], times.fps, policy.name)
    cost = made.costs[0]
    return Generated(
        out=options.out,
        policy=policy.name,
        frames=times.config.pixel_frames(frames),
        latent_frames=frames,
        fps=times.fps,
        took=took,
        peak_bytes=cost.peak_bytes,
        rows_read=cost.rows_read,
        rows_all=cost.rows_history,
        rows_scored=cost.rows_scored,
        rebuilt_frames=cost.rebuilt_frames,
        notes=tuple(notes(options.model, plan)),
    )


@dataclass(frozen=True)
class Plan:
    """What a video will be, known before a model is loaded.

    Args:
        times: Its seconds and frames.
        seconds: Length that was asked for.
        frames: Latent frames.
        size: Latent height and width.
        switches: Prompts on the way.
        prompts: Every prompt that the text encoder will be asked.
    """

    times: FrameTimes
    seconds: float
    frames: int
    size: tuple[int, int]
    switches: tuple[PromptSwitch, ...]
    prompts: tuple[str, ...]

    @classmethod
    def of(
        cls, options: GenerateOptions, config: WanConfig, check: Callable[[str], object]
    ) -> Plan:
        """Read the options of a model; ``check`` raises where it cannot read a prompt.

        Raises:
            ValueError: A prompt, size or switch that does not fit, or a negative prompt without
                guidance.
        """
        check(options.prompt)
        check_negative(options.negative, options.model, config)
        times = FrameTimes(config, options.fps or config.fps)
        seconds = options.seconds or min(LENGTH, times.seconds(config.train_horizon))
        frames = times.frames(seconds)
        switches = tuple(read_switches(options.switches, frames, times, check))
        prompts = (options.prompt, *(switch.prompt for switch in switches))
        prompts += (options.negative,) if config.guidance != 1 else ()
        size = read_size(options.size, config)
        return cls(times, seconds, frames, size, switches, prompts)


def model_for(options: GenerateOptions, prompts: Sequence[str]) -> VideoModel:
    """The model, with a VAE only where pixels are wanted."""
    return load_model(
        options.model,
        "cuda" if resolved(options.accelerator) == "gpu" else "cpu",
        precision=options.precision,
        text=options.text,
        vae=options.vae,
        decode=options.out.suffix.lower() != SUFFIX,
        prompts=prompts,
    )


def write(
    options: GenerateOptions, model: VideoModel, latents: Tensor, fps: float, policy: str
) -> None:
    """The video, decoded piece by piece; or the latents, for ``lightning-kv decode``."""
    if options.out.suffix.lower() == SUFFIX:
        about = {
            "prompt": options.prompt,
            "model": options.model,
            "policy": policy,
            "seed": str(options.seed),
            "noise_revision": str(NOISE_REVISION),
            "precision": model.source["precision"],
        }
        write_latents(options.out, latents, fps, about)
        return
    write_mp4(options.out, enlarged(model.codec.stream(latents.float())), fps)


def run(
    options: GenerateOptions, model: VideoModel, policy: CachePolicy, plan: Plan
) -> tuple[Rollout, float]:
    """The rollout behind a progress line, and its seconds."""
    config = model.network.config
    began = time.perf_counter()
    chunks = config.plan(plan.frames).count
    with RolloutProgress(1, chunks, config.chunk, visible=True) as progress:
        progress.begin(policy.name, 1)
        made = rollout(
            model,
            policy,
            options.prompt,
            plan.frames,
            seed=options.seed,
            latent_size=plan.size,
            events=[switch.event for switch in plan.switches],
            negative=options.negative,
            decode=False,
            progress=progress.chunk,
        )
    made.session = None  # frees the cache before pixels are made
    return made, time.perf_counter() - began


def check_out(out: Path, force: bool) -> None:
    """Refuse a file that cannot or must not be written.

    Raises:
        ValueError: It is no .mp4 and no file of latents, its folder is missing, or it exists.
    """
    if out.suffix.lower() not in (".mp4", SUFFIX):
        raise ValueError(
            f"A video is written as .mp4, and {str(out)!r} does not end so. "
            f"Give -o {out.with_suffix('.mp4') if out.name else 'out.mp4'}, or {SUFFIX} for its "
            "latents."
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
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value:g} makes no video. Give {unit} above 0, such as 8.")
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads} leaves nobody to work. Use 1 or more.")
    resolved(options.accelerator)


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


def notes(name: str, plan: Plan) -> list[str]:
    """What the user should know: times that were rounded, lengths that the model never saw."""
    times, config = plan.times, plan.times.config
    said, made = [], times.seconds(plan.frames)
    if not math.isclose(made, plan.seconds):
        said.append(
            f"{plan.seconds:g} s became {made:g} s: {plan.frames} latent frames, in whole chunks "
            f"of {config.chunk}."
        )
    for switch in plan.switches:
        start = times.seconds(switch.frame)
        if not math.isclose(start, switch.asked):
            said.append(
                f"The switch to {switch.prompt!r} at {switch.asked:g} s comes at {start:g} s, with "
                "the first frame of its chunk."
            )
    if plan.switches and config.sampler == "rolling":
        said.append(
            f"Chunks are denoised {len(config.timesteps)} at a time under one prompt, so those "
            "just before a switch end under the new one."
        )
    if plan.frames > config.train_horizon:
        said.append(
            f"{plan.frames} frames exceed the {config.train_horizon} that {name} was trained "
            "for: later frames may fail."
        )
    return said
