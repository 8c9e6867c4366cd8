"""Evaluate cache policies: one clip per prompt and policy, from the same prompt and noise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_kv.cache.probe import AttentionProbe
from lightning_kv.cache.session import Watch
from lightning_kv.cache.trace import Trace
from lightning_kv.data.datamodule import PromptData, PromptSample
from lightning_kv.metrics import Suite
from lightning_kv.models.loading import check_memory, load_model
from lightning_kv.models.samplers import ChunkPlan
from lightning_kv.models.sources import Source, find_model
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import load_policy
from lightning_kv.rollout import Rollout, rollout, together
from lightning_kv.runs.directory import RunDirectory, fingerprint, write_atomic
from lightning_kv.runs.traces import write_traces
from lightning_kv.runs.video import Frames
from lightning_kv.tasks.choices import chosen_policies, needs_of
from lightning_kv.tasks.clock import read_size
from lightning_kv.tasks.featured import read_real, real_videos
from lightning_kv.tasks.launch import is_first, launched
from lightning_kv.tasks.options import EvaluateOptions, TrainerOptions
from lightning_kv.tasks.overview import conclude
from lightning_kv.tasks.progress import RolloutProgress
from lightning_kv.tasks.recording import Recorder
from lightning_kv.tasks.results import about, describe, fitted
from lightning_kv.tasks.scenes import Start, stack_context, start_of
from lightning_kv.tasks.settle import check_options, check_text, known, settled


class Evaluate(L.LightningModule):
    """Rolls out the reference and every policy, measures, and writes one record per clip.

    Args:
        options: What to run.
        model: The model.
        policies: By name, in the order of the table.
        reference: What the others are compared with.
        suite: What is measured.
        run: Where records go.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        model: VideoModel,
        policies: dict[str, CachePolicy],
        reference: CachePolicy,
        suite: Suite,
        run: RunDirectory,
    ) -> None:
        super().__init__()
        self.options, self.policies, self.reference, self.run = options, policies, reference, run
        self.needs = needs_of(policies.values())
        self.network, self.codec, self.encoder = model.network, model.codec, model.encoder
        self.metrics = nn.ModuleList(nn.ModuleDict(suite.clip_metrics()) for _ in self.names)
        self.encoders = nn.ModuleDict(suite.encoders())
        self.probed = any("attention" in choice.needs for choice in suite.choices.values())
        context = options.context_frames
        given = self.network.config.pixel_frames(context) if context else 0
        self.recorder = Recorder(run, options, self.encoders, given)
        self.progress: RolloutProgress | None = None
        self.pictured: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Policies in the results: the reference and those that were asked for."""
        return list(dict.fromkeys([self.reference.name, *self.policies]))

    @property
    def _first(self) -> bool:
        """Whether the reference is rolled out once more, before all others.

        Asked for as a policy, it shows whether a rollout repeats; and recording takes time, which
        must not count as the reference's.
        """
        return self.reference.name in self.policies or bool(self.needs)

    @property
    def model(self) -> VideoModel:
        """The model, on this rank's device."""
        return VideoModel(self.network, self.codec, self.encoder)

    def on_test_start(self) -> None:
        """Warm up, so that the first clip's timing is like the others'."""
        self.recorder.rank = self.global_rank
        data: PromptData = self.trainer.datamodule
        left = data.total - len(data.finished)
        mine = len(range(self.global_rank, left, self.trainer.world_size))
        plan = self._plan()
        self.progress = RolloutProgress(
            mine, (len(self.names) + self._first) * plan.count, plan.chunk, self.global_rank == 0
        )
        self.progress.__enter__()
        if mine:
            prompt = next(iter(data.test_dataloader()))[0].prompt
            full = load_policy("full")
            rollout(
                self.model,
                full,
                prompt,
                2 * plan.chunk,
                latent_size=self.latent_size,
                negative=self.options.negative,
                backend=self.options.backend,
                decode=False,
            )

    def test_step(self, batch: list[PromptSample], _: int) -> None:
        """All rollouts of some prompts; their records; what there is to see of them."""
        options = self.options
        starts = [
            start_of(sample, self.codec, options.frames, options.context_frames) for sample in batch
        ]
        shown = [i for i, start in enumerate(starts) if start.sample.key in self.pictured]
        clips: list[dict[str, Frames]] = [{} for _ in starts]
        traces: list[dict[str, dict[str, np.ndarray]]] = [{} for _ in starts]
        reference = None
        if self._first:
            reference = self._rollout(self.reference, starts, [], record=self.needs)
        for name, metrics in zip(self.names, self.metrics, strict=True):
            trace = Trace() if shown else None
            probe = self._probe()
            watching = [watch for watch in (trace, probe) if watch is not None]
            policy = self.policies.get(name, self.reference)
            tables = {need: reference.tables[need] for need in policy.needs}
            out = self._rollout(policy, starts, watching, tables)
            reference = reference or out  # the first name
            compared = reference if name in self.policies else None  # asked for, or only compared
            self.recorder.clips(name, metrics, out, compared, reference, starts, probe)
            for i in shown:
                traces[i][name] = trace.arrays(i)
                if options.decode:
                    clips[i][name] = fitted(out.frames[i])
        for i in shown:
            write_traces(self.run.traces / f"{starts[i].sample.key}.npz", traces[i])
            if options.decode:
                self.recorder.picture(starts[i], clips[i], self.reference.name)
        self.progress.end(len(batch))

    def close(self) -> None:
        """Leave the terminal tidy, after an error too."""
        if self.progress is not None:
            self.progress.__exit__()

    def on_test_epoch_end(self) -> None:
        """Log the means over all ranks; one reduction, after the last clip."""
        for policy, metrics in zip(self.names, self.metrics, strict=True):
            for name, metric in metrics.items():
                self.log(f"{policy}/{name}", metric)

    def _plan(self) -> ChunkPlan:
        return self.network.config.plan(self.options.frames, self.options.context_frames)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width of every clip."""
        return read_size(self.options.size, self.network.config)

    def _probe(self) -> AttentionProbe | None:
        """What watches attention in the last denoising pass, where a metric wants it."""
        if not self.probed:
            return None
        return AttentionProbe([len(self.network.config.timesteps) - 1])

    def _rollout(
        self,
        policy: CachePolicy,
        starts: list[Start],
        watching: list[Watch],
        tables: dict[str, list[Any]] | None = None,
        record: dict[str, dict[str, Any]] | None = None,
    ) -> Rollout:
        samples = [start.sample for start in starts]
        self.progress.begin(policy.name, len(samples))
        made = rollout(
            self.model,
            policy,
            [sample.prompt for sample in samples],
            self.options.frames,
            seed=self.options.seed,
            keys=[sample.key for sample in samples],
            context=stack_context(starts),
            latent_size=self.latent_size,
            negative=self.options.negative,
            backend=self.options.backend,
            decode=False,
            watch=together(watching),
            tables=tables,
            record=record or {},
            progress=self.progress.chunk,
        )
        made.session = None  # frees the cache before pixels are made, and before the next rollout
        if self.options.decode:
            made.frames = self.codec.decode(made.latents.float())
        return made


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
    policies, reference = chosen_policies(options)
    data = PromptData(options.data.shards, options.prompts, options.data.seed, options.batch)
    trainer = trainer_for(settings)
    everyone = [reference, *policies.values()]
    suite = Suite(options.metrics, known(source, options), options.accept_license.split(","))
    real = real_videos(options.real, suite)
    model = model_for(options, source, data, everyone, trainer.strategy.root_device)
    place = settings.accelerator
    described = describe(options, policies, reference, model, data, suite, real, place)
    enough(trainer.world_size, data.total)
    run = RunDirectory(options.out)
    if is_first():
        device = str(trainer.strategy.root_device)
        told = about(options, policies, reference, model, data.total, suite, device)
        run.open(fingerprint(described), described, told)
        write_atomic(run.config, config_yaml(options))
        read_real(run, real, suite.encoders())  # what is damaged is better known before
    task = Evaluate(options, model, policies, reference, suite, run)
    task.pictured = set(data.keys()[: options.videos])
    if run.path.is_dir():
        data.finished = task.recorder.finished(task.names, task.pictured)
    try:
        trainer.test(task, datamodule=data, verbose=False)
    finally:
        task.close()
    trainer.strategy.barrier("records are written")
    if not trainer.is_global_zero:
        return {}
    return conclude(run)


def model_for(
    options: EvaluateOptions,
    source: Source,
    data: PromptData,
    policies: list[CachePolicy],
    device: torch.device,
) -> VideoModel:
    """The model, once everything that can be known before has been checked."""
    if source.config is not None:  # before gigabytes are read
        check_options(options, source.config, False, policies)
        check_memory(source.config, options.precision, device)
        check_text(options, source)
    guided = source.config is not None and source.config.guidance != 1
    model = load_model(
        options.model,
        precision=options.precision,
        text=options.text,
        vae=options.vae,
        decode=options.decode,
        prompts=data.prompt_texts() + [options.negative] * guided,
    )
    if source.config is None:
        check_options(options, model.network.config, True, policies)
    return model


def trainer_for(settings: TrainerOptions) -> L.Trainer:
    """A Trainer that only runs; what it would write or show is ours."""
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


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
