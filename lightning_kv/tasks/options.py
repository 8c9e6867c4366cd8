"""Settings of the commands: plain data without torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PRESET_POLICIES = ["full", "sliding-window@9f", "sink-window@9f", "top-attention@9f", "random@9f"]


@dataclass
class TrainerOptions:
    """Where a job runs: one device of one machine, or what a launcher started, by default.

    Args:
        devices: Processes (CPU) or GPUs: a number, or a list such as 0,2.
        accelerator: cpu, gpu, or auto (a CUDA GPU if there is one).
        num_nodes: Machines.
        logger: csv, tensorboard, or package.module:Class; logs the means at the end.
    """

    devices: int | str | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    num_nodes: int | None = None
    logger: str | None = None


@dataclass
class DataOptions:
    """What streams in.

    Args:
        shards: Folder of prompt shards (`lightning-kv encode` makes one).
        seed: Of the worlds that are drawn for the prompts.
    """

    shards: Path | None = None
    seed: int = 0


@dataclass
class EvaluateOptions:
    """Roll out the reference and every policy from the same prompts and noise, and compare.

    Args:
        policies: Names (h2o@9f), YAML files, package.module:Class, or parts in place.
        budgets: Such as 6f,9f,15f, for every policy whose budget is not named.
        reference: The policy that the others are compared with.
        model: panorama, a name of `lightning-kv list models`, NAME=FILE, or a file.
        precision: float32, reference (the casts of the original code) or fast.
        text: Folder of embeddings (default: the shards' own), or of a text encoder.
        vae: Folder of the VAE.
        data: Prompts and worlds.
        prompts: Number of prompts from the start of the set; all where not given.
        samples: Noises per prompt; statistics count prompts.
        frames: Latent frames per clip, the context included.
        context_frames: Given frames at the start; 0 generates from the prompt alone.
        size: HEIGHTxWIDTH in pixels.
        seed: Of the noise.
        negative: What guidance leads away from (models with guidance).
        metrics: Such as psnr,fvd/panorama-encoder; see `lightning-kv list metrics`.
        real: Folder of real videos for fvd and kvd (the panorama has its own).
        accept_license: Of non-commercial weights, comma-separated.
        decode: Make pixels; without them no videos and no metrics of pixels.
        latents: Keep the latents of every clip, for `lightning-kv decode`.
        out: Run directory. An unfinished run with the same settings goes on there.
        batch: Clips rolled out together.
        backend: Attention kernel, sdpa or reference.
        threads: CPU threads per process; can change the last digit of results.
        videos: Prompts with moving pictures.
        fps: Frames per second of the moving pictures.
        trainer: Where it runs.
    """

    policies: list[str | dict[str, Any]] = field(default_factory=lambda: list(PRESET_POLICIES))
    budgets: str | list[str | float] | None = None
    reference: str = "full"
    model: str = "panorama"
    precision: str | None = None
    text: Path | None = None
    vae: Path | None = None
    data: DataOptions = field(default_factory=DataOptions)
    prompts: int | None = None
    samples: int = 1
    frames: int | None = None
    context_frames: int | None = None
    size: str | None = None
    seed: int = 0
    negative: str = ""
    metrics: list[str] | str | None = None
    real: Path | None = None
    accept_license: str = ""
    decode: bool = True
    latents: bool = False
    out: Path = Path("runs/evaluate")
    batch: int = 1
    backend: str = "sdpa"
    threads: int = 1
    videos: int | None = None
    fps: float | None = None
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


@dataclass(frozen=True)
class CompareOptions:
    """Compare folders of videos that somebody else made with a reference folder.

    Args:
        reference: Folder of the videos that are right; None with ``pairs``.
        candidates: Folders of the videos that are judged; empty with ``pairs``.
        out: Run directory. An unfinished comparison of the same files goes on there.
        pairs: A CSV table of pairs instead of folders.
        metrics: Which metrics (see `lightning-kv list metrics`); those that need no weights where
            not given.
        length: equal, or shortest: cut all videos of a clip to the shortest of them.
        size: equal, or resize: bring candidates to the size of the reference.
        fps: equal, or ignore: compare the n-th frame with the n-th frame all the same.
        unpaired: The folders have no videos in common: compare sets, and each video alone.
        real: Folder of real videos that sets are compared with; the reference where not given.
        accept_license: Licences of non-commercial weights that you agree to.
        strict: Stop at the first video that cannot be used, also of an earlier call.
        videos: Pairs with moving pictures.
        threads: CPU threads per process.
        workers: Processes per device that read ahead.
        devices: Processes (CPU) or GPUs.
        accelerator: cpu, gpu, or auto (a CUDA GPU if there is one).
    """

    out: Path
    reference: Path | None = None
    candidates: tuple[Path, ...] = ()
    pairs: Path | None = None
    metrics: tuple[str, ...] | None = None
    length: str = "equal"
    size: str = "equal"
    fps: str = "equal"
    unpaired: bool = False
    real: Path | None = None
    accept_license: tuple[str, ...] = ()
    strict: bool = False
    videos: int = 3
    threads: int = 1
    workers: int = 0
    devices: int | str | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


@dataclass(frozen=True)
class GenerateOptions:
    """Generate one video from a prompt alone, and say what it cost.

    Args:
        prompt: What the model is told.
        out: The video, an .mp4 file; or its latents, a .safetensors file, for `decode`.
        model: panorama, a published checkpoint (see `lightning-kv list models`), NAME=FILE, or a
            file.
        policy: A preset (top-attention@9f), a YAML file, or parts in place, as for evaluate; the
            one that the model's authors run where not given.
        seconds: Length, rounded up to whole chunks; 6, or what the model was trained for.
        seed: Of the noise.
        fps: Frames per second; the model's own where not given.
        size: HEIGHTxWIDTH in pixels; the model's own where not given.
        switches: Prompts on the way, each TEXT@SECONDS.
        negative: What guidance leads away from (models with guidance).
        precision: float32, reference or fast; the model's own where not given.
        text: Folder of embeddings, or of tokenizer and text encoder.
        vae: Folder of the VAE.
        force: Replace the video if it exists.
        threads: CPU threads.
        accelerator: cpu, gpu, or auto (a CUDA GPU if there is one).
    """

    prompt: str
    out: Path
    model: str = "panorama"
    policy: str | None = None
    seconds: float | None = None
    seed: int = 0
    fps: float | None = None
    size: str | None = None
    switches: tuple[str, ...] = ()
    negative: str = ""
    precision: str | None = None
    text: Path | None = None
    vae: Path | None = None
    force: bool = False
    threads: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum.

    Args:
        steps: Optimiser steps.
        chunks: Sequence length in chunks.
        batch: Clean sequences per step.
        sizes: Smallest and largest n (camera positions) that are drawn.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        hold: Share of the stage at the peak; after it the rate falls linearly.
        final: Last learning rate as a share of the peak.
        floor: Loss weight is ``1 / max(t, floor)**2``.
        head_dropout: Chance that a head is silenced for one sequence.
    """

    steps: int
    chunks: int
    batch: int
    sizes: tuple[int, int]
    lr: float
    warmup: int = 0
    hold: float = 1.0
    final: float = 1.0
    floor: float = 0.6
    head_dropout: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate at a step of this stage."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        late = (step / self.steps - self.hold) / max(1 - self.hold, 1e-9)
        return self.lr * (1 - (1 - self.final) * min(max(late, 0.0), 1.0))


@dataclass(frozen=True)
class Recipe:
    """Everything the training run depends on.

    Args:
        stages: The curriculum.
        seed: Of worlds, noise and initial weights.
        streams: Noisy streams per clean one.
        shift: Timestep shift of the training noise; above 1 means more noise.
        history_noise: Largest noise added to a clean chunk; makes rollouts correct themselves.
        history_dropout: Share of the steps in which the visible history is cut.
        slow: Share of slow pans.
        ema: Decay of the averaged weights, before and after step 500.
        weight_decay: Of the matrices.
    """

    stages: list[Stage]
    seed: int = 0
    streams: int = 2
    shift: float = 3.0
    history_noise: float = 0.12
    history_dropout: float = 0.3
    slow: float = 0.35
    ema: tuple[float, float] = (0.99, 0.995)
    weight_decay: float = 0.02

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], self.stages[-1].steps - 1


@dataclass
class PretrainOptions:
    """Train the embedded model on the panorama world, or go on from the last checkpoint in `out`.

    Args:
        recipe: What to train.
        out: Run directory: checkpoints, losses, pictures and, at the end, the weights.
        threads: CPU threads.
        checkpoint_every: Steps between two checkpoints.
        picture_every: Steps between two sample pictures; 0 for none.
        accelerator: cpu, gpu, or auto (a CUDA GPU if there is one); always one device.
    """

    recipe: Recipe
    out: Path = Path("runs/pretrain_panorama")
    threads: int = 2
    checkpoint_every: int = 50
    picture_every: int = 100
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
