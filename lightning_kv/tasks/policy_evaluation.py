"""Cache policies judged while somebody trains: a callback for the Trainer of any AR video model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L

from lightning_kv.data.datamodule import PromptDataModule, PromptSample, RolloutItem, dealt
from lightning_kv.data.shards import prompt_key, world_seed_of
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.base import CachePolicy
from lightning_kv.tasks.evaluate import EvaluateModule


class PolicyEvaluation(L.Callback):
    """Rolls the model in training out under cache policies, and logs what they keep.

    Every so many steps the reference and the policies generate the same clips from the same
    prompts and noise, each prompt on one rank; the means over all ranks go to every logger of the
    Trainer as ``kv/POLICY/METRIC``, and to ``trainer.callback_metrics``, where ``ModelCheckpoint``
    and ``EarlyStopping`` find them. The state of the training, random numbers included, is left as
    it was.

    Args:
        policies: As for :class:`~lightning_kv.tasks.evaluate.EvaluateModule`.
        prompts: Validation prompts: texts, or a data module of prompts.
        every_n_steps: Optimiser steps (``trainer.global_step``) between two evaluations.
        model: How to get the model out of the LightningModule; by default its attributes
            ``network`` or ``model``, ``codec`` and ``encoder``.
        prefix: Of the names that are logged.
        settings: Everything else that ``EvaluateModule`` takes: reference, metrics, frames, ...

    Raises:
        ValueError: There are no prompts, or ``every_n_steps`` is below 1.

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
        **settings: Any,
    ) -> None:
        if every_n_steps < 1 or not prompts or isinstance(prompts, str):
            raise ValueError(
                f"Nothing to evaluate, or never: prompts={prompts!r}, every_n_steps="
                f"{every_n_steps}. Give one prompt or more in a list, and 1 step or more."
            )
        self.policies, self.prompts, self.every = policies, prompts, every_n_steps
        self.model, self.prefix, self.settings = model or video_model, prefix, settings
        self.module: EvaluateModule | None = None
        self.last = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check policies, metrics and prompts before the first step."""
        model = self.model(pl_module)
        self.module = EvaluateModule(model, self.policies, **self.settings)
        if self.module.real:
            raise ValueError(
                f"real={self.settings['real']} is not read while a model trains. Leave it out: "
                "sets are compared with what the world shows, or the clips of the reference."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from here on, also where a training goes on."""
        self.last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Evaluate, where it is time."""
        step = trainer.global_step
        if step // self.every > self.last // self.every:
            self.last = step
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Roll out, measure and log now; every rank has to call this.

        Returns:
            What is logged.
        """
        module = self.module.to(pl_module.device)
        training = {each for each in module.network.modules() if each.training}
        module.network.eval()
        try:
            for prompt in dealt(self._samples(), trainer.global_rank, trainer.world_size):
                for name in module.names:
                    module.test_step([RolloutItem(prompt, 0, name)], 0)
            found = {
                f"{self.prefix}{name}": metric.compute().item()
                for name, metric in module.results().items()
            }
        finally:
            for each in training:
                each.training = True
            module.forget()
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
        pl_module.log_dict(found, on_step=True, on_epoch=False, logger=False)
        return found

    def _samples(self) -> list[PromptSample]:
        if isinstance(self.prompts, PromptDataModule):
            return self.prompts.prompt_samples()
        seeds = [world_seed_of(0, text) for text in self.prompts]
        return [
            PromptSample(prompt_key(text, seed), text, seed)
            for text, seed in zip(self.prompts, seeds, strict=True)
        ]


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
