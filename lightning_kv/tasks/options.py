"""Settings of tasks: plain data without torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

DEFAULT_POLICIES = (
    "full",
    "sliding-window@9f",
    "sink-window@9f",
    "top-attention@9f",
    "random@9f",
)
"""Policies of an evaluation where nobody says."""

NOT_TRAINED = "nothing is trained here, and only a test loop runs"
NOT_TESTED = "a training here has no other loop"
OWN_WRITING = "what a run writes is under --out, and it goes on from there"
OF_RECIPE = "what the numbers depend on is in the recipe"
ONE_DEVICE = "a recipe gives the same numbers everywhere, so it is trained on one device"


@dataclass
class TrainerOptions:
    """Where a job runs, and what of Lightning's Trainer takes part in it.

    A class comes as package.module:Class, or as a mapping of class_path and init_args.

    Args:
        devices: Processes (CPU) or GPUs: 4, or 0,2 (1, or the launcher's).
        accelerator: cpu, gpu, or auto: a CUDA GPU if there is one.
        num_nodes: Machines (1, or the launcher's).
        strategy: Of Lightning's, or a class (one device, or ddp).
        precision: Autocast: 32-true (none), 16-mixed or bf16-mixed.
        logger: csv, tensorboard, classes: get the means at the end (none).
        callbacks: Classes, which come after those that write the run (none).
        plugins: Classes (none).
        profiler: simple, advanced (write under --out) or a class (none).
        limit_test_batches: Rollouts of a rank, or share of them (all).
        deterministic: Refuse kernels that do not repeat, or warn (false).
        benchmark: Let cuDNN choose by trying (Lightning's).
        inference_mode: False: no_grad.
    """

    devices: int | str | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    num_nodes: int | None = None
    strategy: dict[str, Any] | str | None = None
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    logger: list[str | dict[str, Any]] | None = None
    callbacks: list[str | dict[str, Any]] | None = None
    plugins: list[str | dict[str, Any]] | None = None
    profiler: dict[str, Any] | str | None = None
    limit_test_batches: int | float | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True

    REFUSED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            (
                *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"),
                *("limit_train_batches", "limit_val_batches", "limit_predict_batches"),
                *("overfit_batches", "val_check_interval", "check_val_every_n_epoch"),
                *("num_sanity_val_steps", "accumulate_grad_batches", "gradient_clip_val"),
                *("gradient_clip_algorithm", "detect_anomaly", "log_every_n_steps"),
                *("reload_dataloaders_every_n_epochs", "sync_batchnorm"),
            ),
            NOT_TRAINED,
        ),
        **dict.fromkeys(
            ("default_root_dir", "enable_checkpointing", "model_registry"), OWN_WRITING
        ),
        "fast_dev_run": "it would write no run; --prompts 1 --frames 24 is as quick",
        "enable_progress_bar": "the line is shown in a terminal only",
        "enable_model_summary": "the report says what the model is",
        "enable_autolog_hparams": "config.yaml and run.json hold all options",
        "use_distributed_sampler": "the data module gives each rank its own items",
        "barebones": "it would run without the callbacks that write the run",
    }
    """Arguments of Lightning's Trainer that make no sense here, and why."""


@dataclass
class DistillTrainerOptions(TrainerOptions):
    """Where clips are collected, on all devices, and students fitted, on the first alone."""

    REFUSED: ClassVar[dict[str, str]] = {
        name: OF_RECIPE if why == NOT_TRAINED else why
        for name, why in TrainerOptions.REFUSED.items()
    }
    """Arguments of Lightning's Trainer that make no sense here, and why."""


@dataclass
class TrainingTrainerOptions:
    """Where a training runs, and what of Lightning's Trainer takes part in it: nothing of numbers.

    A class comes as package.module:Class, or as a mapping of class_path and init_args.

    Args:
        accelerator: cpu, gpu, or auto: a CUDA GPU if there is one; one device.
        logger: csv, tensorboard, classes: get the losses as it goes (csv, or [] for none).
        callbacks: Classes, which come after those that write the run (none).
        profiler: simple, advanced (write under --out) or a class (none).
        log_every_n_steps: Steps between two lines of a logger.
        deterministic: Refuse kernels that do not repeat, or warn (false).
        benchmark: Let cuDNN choose by trying (Lightning's).
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    logger: list[str | dict[str, Any]] | None = None
    callbacks: list[str | dict[str, Any]] | None = None
    profiler: dict[str, Any] | str | None = None
    log_every_n_steps: int = 10
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None

    REFUSED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("devices", "num_nodes", "strategy", "plugins", "sync_batchnorm"), ONE_DEVICE
        ),
        **dict.fromkeys(
            (
                *("max_epochs", "min_epochs", "max_steps", "min_steps", "limit_train_batches"),
                *("overfit_batches", "accumulate_grad_batches", "gradient_clip_val", "precision"),
                *("gradient_clip_algorithm", "reload_dataloaders_every_n_epochs"),
            ),
            OF_RECIPE,
        ),
        **dict.fromkeys(
            (
                *("limit_val_batches", "limit_test_batches", "limit_predict_batches"),
                *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
                "inference_mode",
            ),
            NOT_TESTED,
        ),
        **dict.fromkeys(
            ("default_root_dir", "enable_checkpointing", "model_registry"), OWN_WRITING
        ),
        "max_time": "stop it whenever you like; the same command goes on",
        "fast_dev_run": "it would write no weights; a recipe of few steps is as quick",
        "detect_anomaly": "a loss or weights that are not finite end a training anyway",
        "enable_progress_bar": "the line is shown in a terminal only",
        "enable_model_summary": "the recipe says what is trained",
        "enable_autolog_hparams": "recipe.json holds all that the numbers depend on",
        "use_distributed_sampler": ONE_DEVICE,
        "barebones": "it would run without the callbacks that write the run",
    }
    """Arguments of Lightning's Trainer that make no sense here, and why."""


@dataclass(frozen=True)
class GenerateOptions:
    """Generate one video from a prompt alone, and say what it cost.

    Args:
        prompt: What the model is told.
        out: The video, an .mp4 file; or its latents, a .safetensors file, for `decode`.
        model: panorama, a name of `lightning-kv list models`, NAME=FILE, or a file.
        policy: A preset (top-attention@9f), a YAML file, package.module:Class, or parts in place
            (what the model's authors run).
        seconds: Length, rounded up to whole chunks (6, or what the model was trained for).
        seed: Of the noise.
        fps: Frames per second (the model's own).
        size: HEIGHTxWIDTH in pixels (the model's own).
        switches: Another prompt from there on, at the start of the chunk; may be given again.
        negative: What guidance leads away from, for models with guidance.
        precision: float32, reference or fast (the model's own).
        text: Folder of embeddings, or of tokenizer and text encoder (the fetched one).
        vae: Folder of the VAE (the fetched one).
        force: Replace the video if it exists.
        threads: CPU threads.
        accelerator: cpu, gpu, or auto: a CUDA GPU if there is one.
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
        trainer: Where it runs.
    """

    recipe: Recipe
    out: Path = Path("runs/pretrain_panorama")
    threads: int = 2
    checkpoint_every: int = 50
    picture_every: int = 100
    trainer: TrainingTrainerOptions = field(default_factory=TrainingTrainerOptions)


@dataclass(frozen=True)
class EncoderRecipe:
    """Everything that the training of the panorama encoder depends on.

    Args:
        seed: Of worlds, degradations and initial weights.
        steps: Optimiser steps.
        worlds: Worlds per step; each gives one clean clip and one that may be degraded.
        lr: Peak learning rate; it warms up, then falls to 0 along a half cosine.
        warmup: Steps of linear warm-up.
        weight_decay: Of all matrices.
    """

    seed: int = 0
    steps: int = 700
    worlds: int = 32
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.02


@dataclass
class PretrainEncoderOptions:
    """Train the encoder that panorama clips are compared with, or go on from the last checkpoint.

    Args:
        recipe: What to train.
        out: Run directory: checkpoints, losses and, at the end, the weights.
        threads: CPU threads; another number sums in another order and gives other last digits.
        checkpoint_every: Steps between two checkpoints.
        trainer: Where it runs; a GPU gives other last digits than the CPU.
    """

    recipe: EncoderRecipe = field(default_factory=EncoderRecipe)
    out: Path = Path("runs/pretrain_encoder")
    threads: int = 1
    checkpoint_every: int = 50
    trainer: TrainingTrainerOptions = field(default_factory=TrainingTrainerOptions)


@dataclass(frozen=True)
class DistillRecipe:
    """Everything that fitting a student to lists depends on beside these.

    Args:
        steps: Optimiser steps of each round.
        batch: Lists of a step.
        lr: Peak learning rate; after the warm-up it falls to the last one along a half cosine.
        final: Last learning rate.
        warmup: Share of the steps in which the rate rises.
        weight_decay: Of matrices alone.
        first: Share of the steps before outputs count.
        tau: The listwise loss wants shares of targets to the power 1 / tau.
        cut: Weight of the ranking loss across the cut.
        penalty: Weight of the mean square of what a student adds to its prior.
        outputs: Weight of the outputs' error, over its value when it first counts.
        soft: Softness of the cut when outputs begin to count, and at the end.
        looks: How often held-out lists are looked at.
        patience: Looks without a better one, after which a round is over.
        newest: How much more often lists of the newest round are drawn than others.
    """

    steps: int = 1500
    batch: int = 1024
    lr: float = 3e-3
    final: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 1e-3
    first: float = 0.6
    tau: float = 2.0
    cut: float = 0.5
    penalty: float = 1e-3
    outputs: float = 1.0
    soft: tuple[float, float] = (1.0, 0.1)
    looks: int = 15
    patience: int = 5
    newest: float = 2.0
