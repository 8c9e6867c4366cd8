"""Executes the passes of a sampler: one loop for every model, policy and task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.cache.host import send, upload
from lightning_kv.cache.passes import CONDITIONAL, Pass
from lightning_kv.cache.record import RECORDERS, recorders
from lightning_kv.cache.recorder import Clip
from lightning_kv.cache.session import CacheSession, Cost, Watch
from lightning_kv.cache.view import PassView
from lightning_kv.models.samplers import (
    ChunkPlan,
    Noise,
    Sampler,
    Steps,
    keyed_noise,
    renoise,
    sampler_of,
    stable_seed,
)
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, Context
from lightning_kv.policies.base import CachePolicy


@dataclass
class Rollout:
    """What a rollout gives back.

    Args:
        latents: ``[B, F, C, h, w]``, the context included.
        frames: Pixels ``[B, F', 3, H, W]`` in [0, 1]; None where decoding was not asked for.
        costs: One per sample.
        seconds_per_chunk: Wall-clock of each generated chunk, all samples of the batch together;
            with several chunks in flight, between one final chunk and the next.
        rebuilds: Number of passes in which frames were encoded again on a policy's word.
        tables: Reference tables that were recorded, by name, one per sample.
        session: The session, for those who want to look into the cache.
    """

    latents: Tensor
    frames: Tensor | None
    costs: list[Cost]
    seconds_per_chunk: list[float]
    rebuilds: int
    tables: dict[str, list[Any]] = field(repr=False)
    session: Any = field(repr=False)


@dataclass(frozen=True)
class Call:
    """All that the network is given in one pass.

    Args:
        network: The model's.
        x: Latents ``[B, F, C, h, w]``.
        timesteps: ``[B, F]``.
        text: From ``network.prepare``.
        session: Answers self-attention.
        step: What the pass is for.
    """

    network: CausalWan
    x: Tensor
    timesteps: Tensor
    text: Context
    session: CacheSession
    step: Pass

    def x0(self) -> Tensor:
        """Run it: the clean estimate."""
        out = self.network(self.x, self.timesteps, self.text, self.session, self.step)
        return self.network.x0(out, self.x, self.timesteps)


@torch.inference_mode(False)
@torch.no_grad()
def rollout(
    model: VideoModel,
    policy: CachePolicy,
    prompts: str | Sequence[str],
    frames: int,
    *,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    context: Tensor | None = None,
    latent_size: tuple[int, int] | None = None,
    events: Sequence[Event] = (),
    negative: str = "",
    backend: str = "sdpa",
    noise: Noise | None = None,
    sampler: Sampler | None = None,
    session: CacheSession | None = None,
    tables: Mapping[str, Sequence[Any]] | None = None,
    record: Mapping[str, Mapping[str, Any]] | Sequence[str] | str = (),
    decode: bool = True,
    watch: Watch | None = None,
    progress: Callable[[int, CacheSession], None] | None = None,
    inputs: dict[str, Any] | None = None,
    buffers: Literal["remake", "keep"] = "remake",
    before: Callable[[Call], None] | None = None,
) -> Rollout:
    """Generate a clip per prompt under a cache policy.

    Args:
        model: From :func:`lightning_kv.load_model`.
        policy: From :func:`lightning_kv.preset` or :func:`lightning_kv.load_policy`.
        prompts: One prompt, or several of equal length for a batch.
        frames: Latent frames, the context included. Where the model makes whole chunks only, a
            multiple of its chunk.
        seed: Of the noise.
        keys: Names that noise and random policies are keyed by; the prompts where not given.
        context: Clean latents ``[B, F0, C, h, w]`` that the rollout goes on from.
        latent_size: Latent height and width; those the model was trained at where not given.
        events: Prompt switches and scene cuts, each at the first frame of a chunk. An event comes
            before the first pass over that frame.
        negative: What guidance leads away from (models with guidance only).
        backend: Attention kernel, ``sdpa`` or ``reference``.
        noise: Another source of noise than (seed, key, chunk, step).
        sampler: Another sampler than the one the checkpoint was made for.
        session: Another session than a fresh one for ``policy`` (calibration, tests).
        tables: Values for the needs that parts declare, by name, one per sample: ``tables`` of a
            rollout of the same prompts and noise that has recorded them.
        record: Reference tables to make, by name, or with settings as ``policy.needs`` has them:
            softmax mass by frame (``mass``), by row of some chunks, on disk (``rows``), outputs by
            frame (``outputs``); see :mod:`lightning_kv.cache.record`. Recording takes time.
        decode: Also give pixels.
        watch: Told of every pass of every layer, such as a :class:`lightning_kv.cache.trace.Trace`.
        progress: Called after every chunk with its index and the session.
        inputs: Side inputs by frame, by name (such as a camera's pose), for all samples or a list
            with one for each; parts find them in ``view.inputs``.
        buffers: See :class:`~lightning_kv.cache.session.CacheSession`.
        before: Shown every pass before it runs, rebuilds left out, for passes of its own whose mode
            is ``scratch``.

    Raises:
        ValueError: Frames, latent size, context, events, budget, prompts or tables that do not fit
            together, or pixels are asked of a model without a codec.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    keys = list(keys or prompts)
    _check_batch(prompts, keys, context)
    if decode and model.codec is None:
        raise ValueError(
            "Pixels were asked for, and this model was loaded without a VAE. "
            "Load one, or roll out with decode=False."
        )
    config = model.network.config
    shape = (config.channels, *(latent_size or config.latent_size))
    if context is not None and (context.ndim != 5 or tuple(context.shape[2:]) != shape):
        raise ValueError(
            f"A context of shape {tuple(context.shape)} does not fit. This rollout takes "
            f"[{len(prompts)}, frames, {', '.join(map(str, shape))}]."
        )
    plan = config.plan(frames, 0 if context is None else context.shape[1])
    geometry = model.network.geometry(latent_size)
    policy.check(geometry, plan.chunk, frames)
    _check_events(events, plan)
    seeds = [stable_seed(seed, key) for key in keys]
    about = (frames, plan.count, geometry, config.passes)
    coming = tuple(sorted(events, key=lambda event: event.frame))
    clips = [
        Clip(key, own, *about, text, plan.context, coming)
        for key, own, text in zip(keys, seeds, prompts, strict=True)
    ]
    _check_tables(tables or {}, clips, policy.needs)
    if session is not None and (record or tables or watch):
        raise ValueError(
            "A session of its own was given together with tables, record or watch, which it would "
            "not hear of. Give them to CacheSession, or leave the session out."
        )
    recording = recorders(record)
    for recorder in recording:
        recorder.begin(clips)
    watch = together([*recording, *([watch] if watch else [])])
    if session is None:
        session = CacheSession(
            geometry,
            policy,
            seeds,
            backend,
            plan.context,
            tables,
            watch,
            keys=keys,
            inputs=inputs,
            buffers=buffers,
        )
    like = next(model.network.parameters())
    latents = like.new_empty(len(prompts), frames, *shape)
    source = noise or keyed_noise(seed, keys, plan, shape)
    run = _Run(model, session, prompts, negative, latents, source, before)
    given = None if context is None else context.to(like)
    sample = sampler or sampler_of(config)
    steps = sample(plan, config.timesteps, lambda c, s: send(source(c, s), like), given)
    seconds = run.all(steps, coming, progress)
    pixels = model.codec.decode(run.latents.float()) if decode else None
    made = {own.name: [own.table(i) for i in range(len(keys))] for own in recording}
    return Rollout(run.latents, pixels, session.costs, seconds, run.rebuilds, made, session)


class _Run:
    """The loop, and what it remembers: past latents and the current prompt."""

    def __init__(
        self,
        model: VideoModel,
        session: CacheSession,
        prompts: list[str],
        negative: str,
        latents: Tensor,
        noise: Noise,
        before: Callable[[Call], None] | None,
    ):
        self.before = before
        self.model, self.session, self.latents, self.noise = model, session, latents, noise
        self.batch, self.negative, self.rebuilds = len(prompts), negative, 0
        self.texts = {CONDITIONAL: self._prepare(prompts)}

    def all(
        self,
        steps: Steps,
        events: Sequence[Event],
        progress: Callable[[int, CacheSession], None] | None,
    ) -> list[float]:
        """Run every pass, with the events in order; returns the seconds of each generated chunk."""
        coming = list(events)
        seconds, estimate, last = [], None, None
        began = time.perf_counter()

        def close(step: Pass) -> None:
            if step.phase == "commit":
                self._wait()
                seconds.append(time.perf_counter() - began)
            if progress:
                progress(step.chunk, self.session)

        while True:
            try:
                step, x = steps.send(estimate)
            except StopIteration:
                close(last)
                return seconds
            if step.opens and step.namespace == CONDITIONAL:
                if last is not None:
                    close(last)
                began = time.perf_counter()
            while coming and coming[0].frame <= step.frames[-1]:
                self._event(coming.pop(0), step)
            if step.phase == "prefill" and step.start:
                self._probe(step, x)
            estimate = self._forward(step, x)
            if step.phase == "denoise":
                self.session.on_prediction(step, step.timesteps[0], estimate)
            if step.final:
                self._keep(step, x if step.clean else estimate.to(x.dtype))
            for sample, answer in self.session.finish(step):
                self._rebuild(sample, answer, step, self.texts[step.namespace])
            last = step

    def _probe(self, step: Pass, x: Tensor) -> None:
        """Show parts that ask for it what the model makes of given frames at a noise level.

        It reads the frames before them, and its own rows are thrown away.
        """
        config, levels = self.model.network.config, self.model.network.config.timesteps
        asked = [part.probed for part in self.session.policy.parts if hasattr(part, "probed")]
        for index in sorted({probed(len(levels)) for probed in asked}):
            t, count = levels[index], len(step.frames)
            noisy = renoise(x, send(self.noise(step.chunk, index), x), t, config.shift)
            scratch = replace(step, phase="denoise", mode="scratch", step=index, final=())
            scratch = replace(scratch, opens=False, timesteps=(t,) * count)
            self.session.on_prediction(scratch, t, self._forward(scratch, noisy))

    def _keep(self, step: Pass, x: Tensor) -> None:
        """Latents of the frames that have become final."""
        low, count = step.frames.index(step.final[0]), len(step.final)
        x = x[:, low : low + count]
        self.latents[:, step.final[0] : step.final[0] + count] = x
        self.session.on_final(step, x)

    def _prepare(self, prompts: list[str]) -> Context:
        return self.model.network.prepare(self.model.encoder(prompts))

    def _wait(self) -> None:
        if self.latents.is_cuda:
            torch.cuda.synchronize(self.latents.device)

    def _forward(self, step: Pass, x: Tensor, text: Context | None = None) -> Tensor:
        if step.namespace not in self.texts:
            self.texts[step.namespace] = self._prepare([self.negative] * self.batch)
        level = upload(step.timesteps, x, torch.float32).expand(len(x), -1)
        text = text or self.texts[step.namespace]
        call = Call(self.model.network, x, level, text, self.session, step)
        if self.before is not None and not step.rebuild and step.mode == "run":
            self.before(call)
        return call.x0()

    def _event(self, event: Event, step: Pass) -> None:
        old = dict(self.texts)
        if event.kind == "prompt_switch":
            self.texts[CONDITIONAL] = self._prepare([event.prompt] * self.batch)
        for namespace, sample, answer in self.session.event(event, step):
            texts = self.texts if answer.prompt == "new" else old
            self._rebuild(sample, answer, replace(step, namespace=namespace), texts[namespace])

    def _rebuild(self, sample: int, answer: Rebuild, step: Pass, text: Context) -> None:
        """Forget one sample's rows and encode past latents again, at t = 0."""
        times = _rebuild_times(answer, step)
        own = [(k[sample : sample + 1], v[sample : sample + 1]) for k, v in text]
        aside = self.session.clear(sample, step.namespace, answer)
        for own_frames in answer.passes(self.model.network.config.chunk):
            ids = answer.frames[own_frames]
            again = Pass(
                "prefill",
                ids,
                (0.0,) * len(ids),
                step.chunk,
                final=ids,
                next_chunk=step.next_chunk,
                namespace=step.namespace,
                times=times[own_frames],
                samples=(sample,),
                rebuild=True,
            )
            past = self.latents[sample : sample + 1, ids[0] : ids[-1] + 1]
            if len(ids) != past.shape[1]:
                past = torch.stack([self.latents[sample, i] for i in ids]).unsqueeze(0)
            self._forward(again, past, own)
            self.session.finish(again)
            self.rebuilds += 1
            self.session.costs[sample].rebuilt_frames += len(ids)
        self.session.rebuilt(sample, step, answer, aside)


def _rebuild_times(answer: Rebuild, step: Pass) -> tuple[float, ...]:
    """Rotary times of the frames to encode again.

    Raises:
        ValueError: They are not past frames in order, or the numbers differ.
    """
    made = step.final[-1] + 1 if step.final else step.start
    past = [f for f in sorted(set(answer.frames)) if 0 <= f < made]
    times = tuple(map(float, answer.frames)) if answer.times is None else answer.times
    if past != list(answer.frames) or len(times) != len(past):
        raise ValueError(
            f"A policy wants frames {answer.frames} encoded again at times {answer.times}; "
            f"frames 0 to {made - 1} have been made. Name past frames, ascending, and as many "
            "times or none."
        )
    if answer.read and {*past} & {*answer.spare}:
        raise ValueError(
            f"A policy wants frames {answer.frames} encoded again while the rows of "
            f"{answer.spare} are read. Name no frame in both."
        )
    return times


def together(watching: Sequence[Watch]) -> Watch | None:
    """Several that watch, as one; None where there is none."""

    def watch(view: PassView) -> None:
        for each in watching:
            each(view)

    return watch if watching else None


def _check_tables(
    tables: Mapping[str, Sequence[Any]], clips: list[Clip], needs: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, own in tables.items():
        if not isinstance(own, list | tuple) or len(own) != len(clips):
            raise ValueError(
                f"{len(own) if isinstance(own, list | tuple) else type(own).__name__} tables "
                f"{name!r} were given for {len(clips)} samples. Give one for each, as `tables` of "
                "a recorded rollout holds them."
            )
        for table, clip in zip(own, clips, strict=True):
            if name not in RECORDERS:
                continue  # somebody else's need
            if not isinstance(table, RECORDERS[name].makes):
                raise ValueError(
                    f"The table {name!r} is {type(table).__name__}. It must be "
                    f"{RECORDERS[name].makes.__name__}, as rollout(..., record=[{name!r}]) makes."
                )
            clip.check(table.clip, name)
            asked = needs.get(name, {}).get("queries", table.queries)
            if asked != table.queries:
                raise ValueError(
                    f"The table {name!r} was recorded with {table.queries} queries of each pass, "
                    f"and the policy wants {asked}. Record it with policy.needs."
                )


def _check_batch(prompts: list[str], keys: list[str], context: Tensor | None) -> None:
    given = {"prompts": len(prompts), "keys": len(keys)}
    if context is not None:
        given["clips of context"] = len(context)
    if len(set(given.values())) > 1 or not prompts:
        raise ValueError(
            f"A batch that does not fit together: {given}. Give one key and one context for each "
            "prompt, and at least one prompt."
        )


def _check_events(events: Sequence[Event], plan: ChunkPlan) -> None:
    if len({event.frame for event in events}) < len(events):
        raise ValueError(
            f"Two events at one frame: {list(events)}. Give each its own chunk: a policy answers "
            "one before it sees the next."
        )
    for event in events:
        if event.kind == "prompt_switch" and not event.prompt:
            raise ValueError(
                f"{event} has no prompt to switch to. Give Event(kind, frame, prompt)."
            )
        if event.kind == "start" or event.frame % plan.chunk or not 0 < event.frame < plan.frames:
            raise ValueError(
                f"{event} cannot happen in a rollout of {plan.frames} frames in chunks of "
                f"{plan.chunk}. Prompt switches and scene cuts come at the first frame of a later "
                f"chunk, such as {plan.chunk * max(1, plan.count // 2)}."
            )
