"""What all trainings share: one optimiser, a rate per step, averaged weights, safe checkpoints."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_kv.tasks.callbacks.progress import TrainingProgressBar
from lightning_kv.tasks.options import TrainingTrainerOptions
from lightning_kv.tasks.trainer import alone, logger_of, trainer_for
from lightning_kv.utilities.files import write_atomic

FORMAT = 2
"""Of checkpoints: 1 was written with two optimisers side by side and rates as factors."""

ADVICE = "give a lower learning rate or a longer warm-up, with another --out"
LAST = "last.ckpt"
RECIPE = "recipe.json"


class Training(L.LightningModule):
    """A training whose numbers depend on its recipe alone, under any Trainer and logger.

    A training of your own says what a step's :meth:`data` is, what is to be minimised
    (:meth:`measure`), by which :meth:`optimizer` and at which learning :meth:`rate`.

    Args:
        steps: Optimiser steps in all.
    """

    advice: ClassVar[str] = ADVICE
    """What may help a training that has come to nothing."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.losses: dict[str, float] = {}
        self._averages: list[tuple[nn.Module, nn.Module]] = []

    def data(self, start: int) -> IterableDataset:
        """Batches from a step on; what is in one depends on its number, not on ``start``."""
        raise NotImplementedError

    def measure(self, batch: Any) -> dict[str, Tensor]:
        """``loss``, which is minimised, and whatever else is worth a curve."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """One optimiser with learning rate 1, which :meth:`rate` scales."""
        raise NotImplementedError

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        raise NotImplementedError

    def decay(self, step: int) -> float:
        """Share that averaged weights keep of themselves at a step; little at first."""
        return min(0.999, (1 + step) / (10 + step))

    def averaged(self, network: nn.Module) -> nn.Module:
        """A copy whose weights will follow those of ``network`` by :meth:`decay`."""
        average = copy.deepcopy(network).requires_grad_(False)
        self._averages.append((average, network))
        return average

    def train_dataloader(self) -> DataLoader:
        """Batches from the step that this run has reached."""
        return DataLoader(self.data(self.global_step), batch_size=None)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and the rate of each step."""
        optimizer = self.optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Measure, log, and give the loss.

        Raises:
            ValueError: The loss is not finite.
        """
        values = self.measure(batch)
        self.losses = {name: float(value.detach()) for name, value in values.items()}
        if not math.isfinite(self.losses["loss"]):
            raise ValueError(
                f"The training has come to nothing: at step {self.global_step} of {self.steps} the "
                f"loss is {self.losses['loss']}, with the learning rate "
                f"{self.rate(self.global_step):.3g}. Nothing was saved since the last checkpoint; "
                f"{self.advice}."
            )
        self.log_dict({**self.losses, "lr": self.rate(self.global_step)})
        return values["loss"]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients at 1, where the Trainer is not told otherwise."""
        self.clip_gradients(optimizer, gradient_clip_val or 1.0, gradient_clip_algorithm or "norm")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimiser, then of the averaged weights."""
        super().optimizer_step(*args, **kwargs)
        decay = self.decay(self.global_step)  # which the loop counts up after this
        with torch.no_grad():  # or the average would carry the graph of every step
            for average, network in self._averages:
                for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                    kept.lerp_(new, 1 - decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite, before a file is touched; keep the last losses.

        Raises:
            ValueError: Weights are not finite.
        """
        when = f"after step {checkpoint['global_step']}"
        check_finite(checkpoint["state_dict"], when, self.advice)
        checkpoint["training"] = {"format": FORMAT, "losses": self.losses}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the last losses."""
        self.losses = checkpoint["training"]["losses"]


class LastStep(L.Callback):
    """Logs and saves the last step too, wherever it falls.

    Args:
        file: The checkpoint.
        every: Steps between two checkpoints, which others write.
    """

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every

    def on_train_batch_start(self, trainer: L.Trainer, task: Training, *_: Any) -> None:
        """Have loggers told of the last step, where they are told of any."""
        if trainer.log_every_n_steps and trainer.global_step + 1 == task.steps:
            trainer.log_every_n_steps = 1

    def on_train_end(self, trainer: L.Trainer, task: Training) -> None:
        """Save what nobody has saved."""
        if trainer.global_step == task.steps and trainer.global_step % self.every:
            trainer.save_checkpoint(self.file, weights_only=False)


def check_finite(weights: Mapping[str, Tensor], when: str, advice: str = ADVICE) -> None:
    """Refuse weights with NaN or infinite values.

    Args:
        weights: By name.
        when: They were made.
        advice: What may help.

    Raises:
        ValueError: Names the first.
    """
    for name, tensor in weights.items():
        wrong = 0 if not tensor.is_floating_point() else int((~tensor.isfinite()).sum())
        if wrong:
            raise ValueError(
                f"The training has come to nothing: {when}, {wrong} of {tensor.numel()} values of "
                f"{name} are not finite. They were not saved, and the last checkpoint is as it "
                f"was; {advice}."
            )


def check_numbers(
    what: str,
    values: Mapping[str, Any],
    low: float,
    high: float = math.inf,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Refuse settings that are no finite numbers in a range.

    Args:
        what: Whose settings, such as ``The recipe``.
        values: By name.
        low: The smallest.
        high: The largest.
        whole: Only whole numbers.
        above: More than ``low``.

    Raises:
        ValueError: Names the setting, what it is and what it may be.
    """
    for name, value in values.items():
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        fits = number and math.isfinite(value) and low <= value <= high
        if not fits or (above and value == low):
            kind = "a whole number" if whole else "a number"
            room = f"above {low}" if above else f"{low} or more"
            if high < math.inf:
                room = f"above {low} and up to {high}" if above else f"from {low} to {high}"
            raise ValueError(
                f"{what} cannot be trained with: {name} is {value!r}. Give {kind} {room}."
            )


def check_options(what: str, options: Any) -> None:
    """Refuse settings of a run, other than its recipe, that cannot work.

    Args:
        what: What is trained, such as ``The panorama encoder``.
        options: As `prepare_training` is given them.

    Raises:
        ValueError: Names the setting, or the place where nothing can be written.
    """
    own = {name: getattr(options, name) for name in ("threads", "checkpoint_every")}
    check_numbers(what, own, 1, whole=True)
    out = options.out
    taken = next((place for place in (out, *out.parents) if place.exists()), out)
    if taken.exists() and not taken.is_dir():
        raise ValueError(
            f"The run directory {out} cannot be made: {taken} is a file. Give another --out."
        )


def described_for(out: Path, recipe: object) -> str:
    """The recipe as JSON, where a directory holds no training run of another one.

    Raises:
        ValueError: It does.
    """
    described = json.dumps(asdict(recipe), indent=2)
    file = out / RECIPE
    if file.exists() and (not file.is_file() or file.read_bytes() != described.encode()):
        raise ValueError(
            f"{out} holds a training run with another recipe. The recipe given is not that in "
            f"{file}. Give another --out, or that recipe."
        )
    return described


def last_checkpoint(out: Path, task: Training) -> Path | None:
    """The checkpoint that a run goes on from; reading it runs no code that is in it.

    Raises:
        ValueError: It is no checkpoint of this training.
    """
    file = out / LAST
    if not file.exists():
        return None
    why = ""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        why = "it is damaged, or holds more than tensors and numbers, and such files can run code"
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        why = f"it cannot be read ({type(error).__name__})"
    else:
        why = _unfit(found, task)
    if why:
        raise ValueError(
            f"The training in {out} cannot go on from {file.name}: {why}. Delete {file} to begin "
            "anew, or give another --out."
        )
    return file


def _unfit(found: Any, task: Training) -> str:
    """Why a checkpoint is not one of a training; nothing where it is."""
    about = found.get("training") if isinstance(found, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        return "it is not of this version's trainings (an earlier version wrote other checkpoints)"
    shapes = {name: tuple(tensor.shape) for name, tensor in found["state_dict"].items()}
    own = {name: tuple(tensor.shape) for name, tensor in task.state_dict().items()}
    for name in own | shapes:
        if own.get(name) != shapes.get(name):
            return f"{name} is {shapes.get(name)} in it, and {own.get(name)} in this network"
    return ""


def prepare_training(
    what: str,
    options: Any,
    logger: Logger | Sequence[Logger] | bool | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[L.Trainer, str]:
    """All that comes before a training's module is made: checks, threads, Trainer.

    Args:
        what: What is trained, for errors: ``The panorama encoder``.
        options: Dataclass of the command: ``recipe``, ``out``, ``threads``, ``checkpoint_every``
            and ``trainer``.
        logger: Of Lightning, instead of those in the options.
        callbacks: Of Lightning, beside those in the options.

    Returns:
        The Trainer, and the recipe as JSON, which `train` writes.

    Raises:
        ValueError: An option cannot work, or ``out`` holds another run.
    """
    check_options(what, options)
    described = described_for(options.out, options.recipe)
    torch.set_num_threads(options.threads)
    trainer = training_trainer(
        options.out, options.checkpoint_every, options.trainer, logger, callbacks
    )
    return trainer, described


def training_trainer(
    out: Path,
    checkpoint_every: int,
    settings: TrainingTrainerOptions | None = None,
    logger: Logger | Sequence[Logger] | bool | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """A Trainer of one device that writes checkpoints.

    Args:
        out: Run directory: checkpoints, and what loggers and profilers write.
        checkpoint_every: Steps between two checkpoints.
        settings: What else it is told; see there for what is logged where nobody says.
        logger: Of Lightning, instead of those in the settings.
        callbacks: Beside the checkpoints, the progress bar and those in the settings.

    Raises:
        ValueError: The settings do not fit, or not to what started this process.
    """
    settings = alone(settings or TrainingTrainerOptions())
    if logger is None:
        named = ("csv",) if settings.logger is None else settings.logger
        logger = [logger_of(each, out, versions=True) for each in named]
    saver = ModelCheckpoint(
        out,
        filename="last",
        every_n_train_steps=checkpoint_every,
        save_top_k=1,
        enable_version_counter=False,
    )
    given = {"devices": 1, "max_epochs": 1, "logger": logger}
    savers = [LastStep(out / LAST, checkpoint_every), saver]
    return trainer_for(settings, [*callbacks, *savers], TrainingProgressBar(), out, **given)


def train(task: Training, trainer: L.Trainer, out: Path, described: str | None = None) -> None:
    """Train until all steps are done, from the last checkpoint in ``out`` on.

    Args:
        task: What to train.
        trainer: From `training_trainer`.
        out: Run directory.
        described: The recipe, which the directory is to hold once its checkpoint is known to fit.

    Raises:
        ValueError: The checkpoint cannot be taken up, the training has come to nothing, or a
            callback or a signal has stopped it.
    """
    checkpoint = last_checkpoint(out, task)
    if described is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / RECIPE, described)
    trainer.fit(task, ckpt_path=checkpoint, weights_only=True)
    if trainer.global_step < task.steps:
        raise ValueError(
            f"The training was stopped before its end: at step {trainer.global_step} of "
            f"{task.steps}. Give the same command again to go on from the last checkpoint, without "
            "a callback that stops it."
        )
    check_finite(task.state_dict(), f"after step {trainer.global_step}")


def commit() -> str:
    """Commit of the code that is running, ``-dirty`` if changed; ``unknown`` outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
