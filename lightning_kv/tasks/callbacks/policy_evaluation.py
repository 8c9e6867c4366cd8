"""Cache policies judged while somebody trains: a callback for the Trainer of any AR video model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from lightning_kv.data.datamodule import (
    PromptDataModule,
    PromptSample,
    RolloutItem,
    dealt,
    each_sample,
    in_batches,
)
from lightning_kv.data.shards import prompt_key, world_seed_of
from lightning_kv.metrics.plugins import in_a_list
from lightning_kv.metrics.registry import Choice
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.base import CachePolicy
from lightning_kv.tasks.evaluate import EvaluateModule
from lightning_kv.tasks.measuring.warnings import warn_missing
from lightning_kv.tasks.rollouts.policies import chosen_policies
from lightning_kv.utilities.nearest import hint

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
"""Strategies under which no process need hold all parameters."""


class PolicyEvaluation(L.Callback):
    """Rolls the model in training out under cache policies, and logs what they keep.

    Every so many steps the reference and the policies generate the same clips from the same
    prompts and noise, each clip on one rank; the means over all ranks go to every logger of the
    Trainer as ``kv/POLICY/METRIC``, and to ``trainer.callback_metrics``, where ``ModelCheckpoint``
    and ``EarlyStopping`` find them. The state of the training, random numbers included, is left as
    it was; all modules are in evaluation mode meanwhile. A training that goes on from a checkpoint
    is evaluated at the steps at which it would have been without the break.

    Args:
        policies: As for :class:`~lightning_kv.tasks.evaluate.EvaluateModule`.
        prompts: Validation prompts: texts, or a data module of prompts, whose ``samples`` and
            ``batch`` count too.
        every_n_steps: Optimiser steps (``trainer.global_step``) between two evaluations.
        model: How to get the model out of the LightningModule; by default its attributes
            ``network`` or ``model``, ``codec`` and ``encoder``.
        prefix: Of the names that are logged.
        samples: Noises per prompt where prompts are texts; 1 where None.
        settings: Everything else that ``EvaluateModule`` takes: reference, metrics, frames, ...

    Raises:
        ValueError: There are no prompts, a number does not fit, a policy or metric is unknown, or
            ``EvaluateModule`` has no such setting.

    Example:
        >>> import lightning as L
        >>> watch = PolicyEvaluation(["sliding-window@9f"], ["night fast n13 left"], 500, frames=24)
        >>> trainer = L.Trainer(callbacks=[watch], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        policies: Sequence[str | dict[str, Any] | CachePolicy],
        prompts: Sequence[str] | PromptDataModule,
        every_n_steps: int,
        model: Callable[[L.LightningModule], VideoModel] | None = None,
        prefix: str = "kv/",
        samples: int | None = None,
        **settings: Any,
    ) -> None:
        if not counts(every_n_steps) or not prompts or isinstance(prompts, str):
            raise ValueError(
                f"Nothing to evaluate, or never: prompts={prompts!r}, every_n_steps="
                f"{every_n_steps!r}. Give one prompt or more in a list, and a whole number of "
                "steps, 1 or more."
            )
        check_prompts(prompts, samples)
        check_settings(settings)
        self.names = list(chosen_policies(policies, settings.get("reference", "full"))[0])
        self.policies, self.prompts, self.every = policies, prompts, every_n_steps
        self.samples = samples or 1
        self.model, self.prefix, self.settings = model or video_model, prefix, settings
        self.module: EvaluateModule | None = None
        self.last, self.resumed = 0, False

    @property
    def state_key(self) -> str:
        """Name of its state in checkpoints: a Trainer may have several such callbacks."""
        return self._generate_state_key(prefix=self.prefix, policies=self.names)

    def state_dict(self) -> dict[str, Any]:
        """The step from which the next evaluation is counted."""
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.last, self.resumed = state_dict["last"], True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check model, strategy and prompts before the first step."""
        self.module = self._made(trainer, pl_module)
        warn_missing(self.module.suite.missing)
        if isinstance(self.prompts, PromptDataModule):
            self.prompts.keys()
            self.module.check_data(self.prompts)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from here on; where a training goes on, from its last evaluation.

        One that was due at the step of the checkpoint, and came after it, is made up for.
        """
        if not self.resumed:
            self.last = trainer.global_step
        self.resumed = False
        self._where_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Evaluate, where it is time."""
        self._where_due(trainer, pl_module)

    def _where_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step // self.every > self.last // self.every:
            self.last = step
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Roll out, measure and log now, in a training or after it; every rank has to call this.

        Returns:
            What is logged.
        """
        self.module = module = self.module or self._made(trainer, pl_module)
        model = self.model(pl_module)
        module.network, module.codec, module.encoder = model.network, model.codec, model.encoder
        module.to(pl_module.device)
        with evaluating(pl_module, module):
            try:
                for batch in self._batches(trainer.global_rank, trainer.world_size):
                    module.test_step(batch, 0)
                found = {
                    f"{self.prefix}{name}": metric.compute().item()
                    for name, metric in module.results().items()
                }
            finally:
                module.forget()
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
            logger.save()  # after a training nobody else does
        # Not by `pl_module.log_dict`, which is refused outside of some hooks of a running loop.
        place = pl_module.device
        told = {name: torch.tensor(value, device=place) for name, value in found.items()}
        trainer.callback_metrics.update(told)
        return found

    def _made(self, trainer: L.Trainer, pl_module: L.LightningModule) -> EvaluateModule:
        model = self.model(pl_module)
        check_strategy(trainer.strategy)
        return EvaluateModule(model, self.policies, **self.settings)

    def _batches(self, rank: int, world: int) -> Iterator[list[RolloutItem]]:
        """What one rank rolls out: its prompts and noises, each under every policy."""
        data = self.prompts
        if isinstance(data, PromptDataModule):
            prompts, samples, batch = data.prompt_samples(), data.samples, data.batch
        else:
            prompts, samples, batch = map(prompt_of, data), self.samples, 1
        mine = dealt(each_sample(prompts, samples), rank, world)
        return in_batches(mine, batch, self.module.names)


def prompt_of(text: str) -> PromptSample:
    """A prompt that is only a text; the seed of its world follows from it."""
    seed = world_seed_of(0, text)
    return PromptSample(prompt_key(text, seed), text, seed)


@contextmanager
def evaluating(*wholes: torch.nn.Module) -> Iterator[None]:
    """Everything in evaluation mode, and at the end each module in its own again."""
    modes = {each: each.training for whole in wholes for each in whole.modules()}
    try:
        for whole in wholes:
            whole.eval()
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


def counts(number: Any) -> bool:
    """Whether it is a whole number, 1 or more; a truth value is none."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def check_prompts(prompts: Sequence[str] | PromptDataModule, samples: int | None) -> None:
    """Refuse prompts that are no texts or come twice, and samples that do not fit them.

    Raises:
        ValueError: They are of these.
    """
    if isinstance(prompts, PromptDataModule):
        if samples is not None:
            raise ValueError(
                f"The data module says how many noises a prompt gets: samples={samples} was given "
                f"beside its {prompts.samples}. Give PromptDataModule(..., samples={samples})."
            )
        return
    if samples is not None and not counts(samples):
        raise ValueError(f"A prompt gets at least one noise: samples={samples!r}. Use 1 or more.")
    try:
        distinct = all(isinstance(text, str) for text in prompts) and len(set(prompts))
    except TypeError:  # it cannot be gone through
        distinct = 0
    if not distinct or distinct < len(prompts):
        raise ValueError(
            f"Prompts are a list of different texts, or a data module: {prompts!r} was given. "
            "Give each text once, or PromptDataModule(...)."
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what ``EvaluateModule`` does not take, or not here.

    Raises:
        ValueError: A name is none of its own, or metrics are no list of known ones.
    """
    own = [name for name in inspect.signature(PolicyEvaluation).parameters if name != "settings"]
    names = [name for name in inspect.signature(EvaluateModule).parameters if name not in own]
    for name in settings:
        if name not in names:
            raise ValueError(
                f"PolicyEvaluation has no setting {name!r}: {name}={settings[name]!r} was given."
                f"{hint(name, [*own, *names])} Settings beside its own are those of "
                f"EvaluateModule: {', '.join(names)}."
            )
    if settings.get("real") is not None:
        raise ValueError(
            f"real={settings['real']} is not read while a model trains. Leave it out: "
            "sets are compared with what the world shows, or the clips of the reference."
        )
    metrics = settings.get("metrics")
    for metric in () if metrics is None else in_a_list(metrics):
        Choice.parse(metric)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy that leaves a process without the whole model.

    Raises:
        ValueError: It is one.
    """
    if isinstance(strategy, SHARDING):
        raise ValueError(
            "PolicyEvaluation rolls out the whole model in every process, and under "
            f"{type(strategy).__name__} its parameters may be spread over them. Train with "
            "strategy='ddp', or evaluate the saved checkpoints by themselves: "
            "Trainer(...).test(EvaluateModule(...), datamodule=...)."
        )


def video_model(module: L.LightningModule) -> VideoModel:
    """The model of a LightningModule by the usual names of its attributes.

    Raises:
        ValueError: There is none.
    """
    network = next(
        (
            found
            for name in ("network", "model")
            if isinstance(found := getattr(module, name, None), CausalWan | VideoModel)
        ),
        None,
    )
    if isinstance(network, VideoModel):
        return network
    encoder = getattr(module, "encoder", None)
    if network is None or encoder is None:
        raise ValueError(
            f"{type(module).__name__} has no model that can be rolled out: attributes network or "
            "model, and encoder, are looked for. Say where it is: PolicyEvaluation(..., "
            "model=lambda module: VideoModel(module.network, module.codec, module.encoder))."
        )
    return VideoModel(network, getattr(module, "codec", None), encoder)
