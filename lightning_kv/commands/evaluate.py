"""`lightning-kv evaluate`: from options to a module, a data module, a Trainer and its callbacks."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.metrics.plugins import in_a_list
from lightning_kv.metrics.registry import Suite
from lightning_kv.models.embeddings import INDEX
from lightning_kv.models.loading import check_memory, load_model
from lightning_kv.models.sources import Source, find_model
from lightning_kv.models.video import VideoModel
from lightning_kv.runs.directory import write_atomic
from lightning_kv.tasks.callbacks import (
    ComparisonVideos,
    RecordWriter,
    RolloutProgressBar,
    TraceWriter,
)
from lightning_kv.tasks.choices import chosen_policies
from lightning_kv.tasks.evaluate import EvaluateModule, known
from lightning_kv.tasks.launch import is_first, launched, logger_of, trainer_for
from lightning_kv.tasks.options import EvaluateOptions
from lightning_kv.tasks.settings import RolloutSettings

FAST_PANS = Path("data/panorama-fast13")


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Run, or go on with, an evaluation; rank 0 writes its conclusions and returns the summary.

    Raises:
        ValueError: Anything that does not fit, before anything is written.
    """
    settings = launched(options.trainer)
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads} leaves nobody to work. Use 1 or more.")
    torch.set_num_threads(options.threads)
    source = find_model(options.model)
    options = settled(options, source)
    writer = RecordWriter(options.out, options.latents)
    pictures = [kind(options.out, options.videos) for kind in (ComparisonVideos, TraceWriter)]
    data = PromptDataModule(
        options.data.shards, options.prompts, options.samples, options.data.seed, options.batch
    )
    callbacks = [writer, *pictures, RolloutProgressBar()]
    trainer = trainer_for(settings, callbacks, logger_of(settings.logger, options.out))
    module = module_for(options, source, data, trainer.strategy.root_device)
    module.warns = False  # the table says it
    if is_first():
        writer.open(trainer, module, data)
        write_atomic(writer.run.config, config_yaml(options))
    trainer.test(module, datamodule=data, verbose=False)
    return writer.summary


def settled(options: EvaluateOptions, source: Source) -> EvaluateOptions:
    """What was not given, as the model wants it.

    Raises:
        ValueError: No prompts are given, and the model has none of its own.
    """
    world = source.config is None
    if options.data.shards is None and not world:
        raise ValueError(
            f"Nothing says which prompts to give to {source.name!r}. Use --data.shards FOLDER; "
            "`lightning-kv encode prompts.txt --out FOLDER` makes one."
        )
    shards = options.data.shards or FAST_PANS
    own = shards if not world and (shards / INDEX).is_file() else None
    rollouts = rollouts_of(options).filled(source.config)
    usual = {
        "text": own,
        "precision": "float32" if world else "reference",
        "metrics": list(Suite(None, known(world, options.decode)).choices),
    }
    if isinstance(options.metrics, str):
        options = replace(options, metrics=in_a_list(options.metrics))
    missing = {name: value for name, value in usual.items() if getattr(options, name) is None}
    data = replace(options.data, shards=shards)
    return replace(options, data=data, **vars(rollouts), **missing)


def rollouts_of(options: EvaluateOptions) -> RolloutSettings:
    """The settings of the rollouts."""
    names = RolloutSettings.__dataclass_fields__
    return RolloutSettings(**{name: getattr(options, name) for name in names})


def module_for(
    options: EvaluateOptions, source: Source, data: PromptDataModule, device: torch.device
) -> EvaluateModule:
    """The module, once everything that can be known before weights are read has been checked."""
    policies, reference = chosen_policies(options.policies, options.reference, options.budgets)
    rollouts, accept = rollouts_of(options), tuple(options.accept_license.split(","))
    Suite(options.metrics, known(source.config is None, options.decode), accept)
    if source.config is not None:  # before gigabytes are read
        everyone = [reference, *policies.values()]
        rollouts.check(options.model, source.config, False, everyone)
        check_memory(source.config, options.precision, device)
        check_text(options, source)
    return EvaluateModule(
        model_for(options, source, data),
        list(policies.values()),
        reference,
        options.metrics,
        **vars(rollouts),
        real=options.real,
        accept_license=accept,
    )


def model_for(options: EvaluateOptions, source: Source, data: PromptDataModule) -> VideoModel:
    """The model."""
    guided = source.config is not None and source.config.guidance != 1
    return load_model(
        options.model,
        precision=options.precision,
        text=options.text,
        vae=options.vae,
        decode=options.decode,
        prompts=data.prompt_texts() + [options.negative] * guided,
    )


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


def config_yaml(options: EvaluateOptions) -> str:
    """The effective settings, readable by ``-c``."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump(plain(asdict(options)), sort_keys=False)
