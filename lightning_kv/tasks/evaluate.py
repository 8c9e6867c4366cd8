"""Evaluate cache policies: one clip per prompt and policy, from the same prompt and noise."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_kv
from lightning_kv.cache.attend import known_backend
from lightning_kv.data.datamodule import PromptData, PromptSample
from lightning_kv.metrics import METRICS, Clip, ClipMetric, clip_value, metric_by_name
from lightning_kv.metrics.statistics import bca_interval
from lightning_kv.models.loading import EmbeddedModel, load_model
from lightning_kv.models.samplers import ChunkPlan
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.presets import load_policy, policy_to_dict
from lightning_kv.report.records import RunDirectory, fingerprint, write_atomic
from lightning_kv.report.summary import MetricInfo, summarise
from lightning_kv.report.video import side_by_side, write_mp4
from lightning_kv.rollout import Rollout, rollout
from lightning_kv.tasks.launch import global_rank, launched
from lightning_kv.tasks.options import EvaluateOptions
from lightning_kv.tasks.progress import RolloutProgress
from lightning_kv.tasks.scenes import Start, panorama_start, stack_context

COMPARED = ("psnr", "ssim", "latent_mse")  # need another rollout to compare with


class Evaluate(L.LightningModule):
    """Rolls out the reference and every policy, measures, and writes one record per clip.

    Args:
        options: What to run.
        model: The model.
        policies: By name, in the order of the table.
        reference: What the others are compared with.
        run: Where records go.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        model: EmbeddedModel,
        policies: dict[str, CachePolicy],
        reference: CachePolicy,
        run: RunDirectory,
    ) -> None:
        super().__init__()
        self.options, self.policies, self.reference, self.run = options, policies, reference, run
        self.network, self.codec, self.encoder = model.network, model.codec, model.encoder
        self.metrics = nn.ModuleList(
            nn.ModuleDict(metric_by_name(options.metrics)) for _ in self.names
        )
        self.progress: RolloutProgress | None = None
        self.pictured: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Policies in the results: the reference and those that were asked for."""
        return list(dict.fromkeys([self.reference.name, *self.policies]))

    @property
    def model(self) -> EmbeddedModel:
        """The model, on this rank's device."""
        return EmbeddedModel(self.network, self.codec, self.encoder)

    def on_test_start(self) -> None:
        """Warm up, so that the first clip's timing is like the others'."""
        data: PromptData = self.trainer.datamodule
        self.pictured = set(data.keys()[: self.options.videos])
        left = data.total - len(data.finished)
        mine = len(range(self.global_rank, left, self.trainer.world_size))
        plan = self._plan()
        rollouts = len(self.policies) + 1
        self.progress = RolloutProgress(
            mine, rollouts * plan.count, plan.chunk, self.global_rank == 0
        )
        self.progress.__enter__()
        if mine:
            prompt = next(iter(data.test_dataloader()))[0].prompt
            full = load_policy("full")
            rollout(self.model, full, prompt, 2 * plan.chunk, backend=self.options.backend)

    def test_step(self, batch: list[PromptSample], _: int) -> None:
        """All rollouts of some prompts; their records; their moving pictures."""
        options = self.options
        starts = [
            panorama_start(sample, self.codec, options.frames, options.context_frames)
            for sample in batch
        ]
        reference = self._rollout(self.reference, starts)
        if self.reference.name not in self.policies:
            self._record(self.reference.name, reference, None, reference, starts)
        clips = {self.reference.name: reference.frames}
        for name, policy in self.policies.items():
            out = self._rollout(policy, starts)
            self._record(name, out, reference, reference, starts)
            clips[name] = out.frames
        for index, start in enumerate(starts):
            if start.sample.key in self.pictured:
                self._picture(start, {name: frames[index] for name, frames in clips.items()})
        self.progress.end(len(batch))

    def on_test_end(self) -> None:
        """Leave the terminal tidy."""
        if self.progress is not None:
            self.progress.__exit__()

    def on_test_epoch_end(self) -> None:
        """Log the means over all ranks; one reduction, after the last clip."""
        for policy, metrics in zip(self.names, self.metrics, strict=True):
            for name, metric in metrics.items():
                self.log(f"{policy}/{name}", metric)

    def _plan(self) -> ChunkPlan:
        return ChunkPlan(
            self.options.frames, self.network.config.chunk, self.options.context_frames
        )

    def _rollout(self, policy: CachePolicy, starts: list[Start]) -> Rollout:
        samples = [start.sample for start in starts]
        self.progress.begin(policy.name, len(samples))
        return rollout(
            self.model,
            policy,
            [sample.prompt for sample in samples],
            self.options.frames,
            seed=self.options.seed,
            keys=[sample.key for sample in samples],
            context=stack_context(starts),
            backend=self.options.backend,
            progress=self.progress.chunk,
        )

    def _record(
        self,
        name: str,
        out: Rollout,
        compared: Rollout | None,
        reference: Rollout,
        starts: list[Start],
    ) -> None:
        for index, start in enumerate(starts):
            clip = Clip(
                latents=out.latents[index],
                pixels=out.frames[index],
                reference_latents=None if compared is None else compared.latents[index],
                reference_pixels=None if compared is None else compared.frames[index],
                context=self.options.context_frames,
                scene=start.scene,
            )
            metrics, curves = measure(self.metrics[self.names.index(name)], clip)
            self.run.append(
                self.global_rank,
                {
                    "policy": name,
                    "key": start.sample.key,
                    "prompt": start.sample.prompt,
                    "metrics": metrics,
                    "curves": curves,
                    "cost": cost(out, reference, index),
                },
            )

    def _picture(self, start: Start, clips: dict[str, Tensor]) -> None:
        panels = [("world", start.truth)] if start.truth is not None else []
        panels += list(clips.items())
        rows = [
            (label, (255 * x).round().byte().permute(0, 2, 3, 1).cpu().numpy())
            for label, x in panels
        ]
        path = self.run.videos / f"{start.sample.key}.mp4"
        write_mp4(path, side_by_side(rows, scale=5), self.options.fps)


def measure(
    metrics: nn.ModuleDict, clip: Clip
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Update each metric with a clip; its value and curve over time (null where it has none)."""
    values, curves = {}, {}
    for name, metric in metrics.items():
        if any(getattr(clip, need) is None for need in metric.needs):
            values[name], curves[name] = None, []
            continue
        metric.update(clip)
        curve = metric.curve(clip)
        values[name] = clip_value(curve)
        curves[name] = [None if x != x else x for x in curve.tolist()]
    return values, curves


def cost(out: Rollout, reference: Rollout, index: int) -> dict[str, Any]:
    """What one clip cost; reads as a share of the reference's."""
    own, base = out.costs[index], reference.costs[index].rows_read
    return {
        "kv_bytes_peak": own.peak_bytes,
        "kv_bytes_mean": sum(own.chunk_bytes) / len(own.chunk_bytes),
        "kv_rows_read": own.rows_read,
        "kv_rows_scored": own.rows_scored,
        "kv_read_fraction": own.rows_read / base if base else None,
        "kv_scored_fraction": own.rows_scored / base if base else None,
        "seconds_per_chunk": out.seconds_per_chunk,
    }


def metric_info(metric: type[ClipMetric]) -> MetricInfo:
    """What the summary says about a metric."""
    undefined = (
        "this is the reference itself"
        if metric.name in COMPARED
        else "no frame shows a place that was seen before"
    )
    return MetricInfo(metric.unit, metric.higher_is_better, metric.recipe, undefined)


def describe(
    options: EvaluateOptions,
    policies: dict[str, CachePolicy],
    reference: CachePolicy,
    data: PromptData,
) -> dict[str, Any]:
    """Everything the numbers depend on: the run's fingerprint is made of it."""
    from lightning_kv.models.loading import WEIGHTS

    named = not options.model.endswith(".safetensors")
    weights = WEIGHTS / f"{options.model}.safetensors" if named else Path(options.model)
    return {
        "model": options.model,
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "policies": {name: policy_to_dict(policy) for name, policy in policies.items()},
        "reference": policy_to_dict(reference),
        "data": {
            "shards": [shard.sha256 for shard in data.index.shards],
            "seed": options.data.seed,
            "prompts": data.total,
        },
        "frames": options.frames,
        "context_frames": options.context_frames,
        "seed": options.seed,
        "metrics": {name: METRICS[name].recipe for name in options.metrics},
        "batch": options.batch,
        "backend": options.backend,
        "threads": options.threads,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this package and of torch."""
    return {"lightning_kv": lightning_kv.__version__, "torch": torch.__version__}


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Run, or go on with, an evaluation; rank 0 writes ``summary.json`` and returns it.

    Raises:
        ValueError: Anything that does not fit, before anything is written.
    """
    torch.set_num_threads(options.threads)
    settings = launched(options.trainer)
    policies = named_policies(options.policies)
    reference = load_policy(options.reference)
    model = load_model(options.model)
    metric_by_name(options.metrics)
    known_backend(options.backend)
    config = model.network.config
    ChunkPlan(options.frames, config.chunk, options.context_frames)
    for policy in (reference, *policies.values()):
        policy.check(config.geometry(), config.chunk, options.frames)
    data = PromptData(options.data.shards, options.prompts, options.data.seed, options.batch)
    described = describe(options, policies, reference, data)
    mark = fingerprint(described)
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    enough(trainer.world_size, data.total)
    run = RunDirectory(options.out)
    if global_rank() == 0:
        run.open(mark, described)
        write_atomic(run.config, config_yaml(options))
    task = Evaluate(options, model, policies, reference, run)
    data.finished = run.finished(task.names) if run.path.is_dir() else set()
    if options.frames > config.train_horizon and global_rank() == 0:
        L.pytorch.utilities.rank_zero_warn(
            f"{options.frames} frames exceed the {config.train_horizon} that {options.model} was "
            "trained for: the reference itself may fail."
        )
    trainer.test(task, datamodule=data, verbose=False)
    trainer.strategy.barrier("records are written")
    if trainer.is_global_zero:
        return summary_of(run, task, data, mark, str(trainer.strategy.root_device))
    return {}


def summary_of(
    run: RunDirectory, task: Evaluate, data: PromptData, mark: str, device: str
) -> dict[str, Any]:
    """Summarise all records of a run and write ``summary.json``."""
    options = task.options
    configs = {task.reference.name: policy_to_dict(task.reference)}
    configs |= {name: policy_to_dict(policy) for name, policy in task.policies.items()}
    found = summarise(
        run.records(),
        reference=task.reference.name,
        policies=configs,
        metrics={name: metric_info(METRICS[name]) for name in options.metrics},
        run={
            "prompts": data.total,
            "frames": options.frames,
            "context_frames": options.context_frames,
            "seed": options.seed,
            "data_seed": options.data.seed,
            "device": device,
            "versions": versions() | {"python": platform.python_version()},
        },
        model={"name": options.model, **task.network.config.to_dict()},
        fingerprint=mark,
        interval=lambda values: bca_interval(values, resamples=1000),
    )
    write_atomic(run.summary, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def named_policies(specs: list[str | dict[str, Any]]) -> dict[str, CachePolicy]:
    """Policies by name.

    Raises:
        ValueError: None, or two of the same name.
    """
    if not specs:
        raise ValueError(
            "No policies to evaluate: [] was given. Try --policies [sliding-window@9f]."
        )
    found: dict[str, CachePolicy] = {}
    for spec in specs:
        policy = load_policy(spec)
        if policy.name in found:
            raise ValueError(
                f"Two policies are called {policy.name!r}: {specs}. "
                "The name is the key in results: give each its own."
            )
        found[policy.name] = policy
    return found


def enough(world: int, prompts: int) -> None:
    """Refuse more ranks than prompts before any process is started.

    Raises:
        ValueError: Says both numbers.
    """
    if world > prompts:
        raise ValueError(
            f"{world} ranks share {prompts} prompts, so some would have nothing to do. "
            f"Use --trainer.devices {prompts} or fewer, or more --prompts."
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
