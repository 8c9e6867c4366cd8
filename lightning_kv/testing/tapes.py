"""Recorded tapes: passes with queries, keys and values, to be played into a cache again and again.

What goes in does not depend on what comes out, so two caches that are given one tape differ by
what they decide and by nothing else. Shapes: B samples, T tokens of a pass, H heads, D head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.record import recorders
from lightning_kv.cache.recorder import Clip
from lightning_kv.cache.rotary import Rotary
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import preset
from lightning_kv.rollout import Rollout, rollout, together
from lightning_kv.testing.schedules import chunked
from lightning_kv.testing.twin import Twin

Layers = tuple[tuple[Tensor, Tensor, Tensor], ...]
"""Queries, keys and values ``[B, T, H, D]`` before rotation, of every layer."""


FULL = preset("full")

Cache = CacheSession | Twin
"""What a tape is played into."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One pass.

    Args:
        step: The pass.
        layers: What goes through each layer.
        x0: The model's clean estimate ``[B, F, C, h, w]``.
        events: What happens before it.
    """

    step: Pass
    layers: Layers
    x0: Tensor
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, eq=False)
class Tape:
    """A sequence of passes with all that goes through them.

    Args:
        geometry: Sizes of the model.
        entries: The passes.
        seeds: Base of the random draws of each sample.
        keys: Prompt key of each sample.
        context: Given frames.
        recorded: Reference tables that have been made of it; its copies share them.
    """

    geometry: Geometry
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...] = (0,)
    keys: tuple[str, ...] = ("a",)
    context: int = 0
    recorded: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> tuple[Pass, ...]:
        """The passes alone."""
        return tuple(entry.step for entry in self.entries)

    @property
    def batch(self) -> int:
        """Number B of samples."""
        return len(self.seeds)

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return 1 + max(step.frames[-1] for step in self.steps)

    def alone(self, sample: int) -> Tape:
        """The same for one of its samples, with the seed and the key that it has in the batch."""
        own = slice(sample, sample + 1)
        return replace(self.copy(own), seeds=self.seeds[own], keys=self.keys[own], recorded={})

    def copy(self, samples: slice = slice(None)) -> Tape:
        """The same (of some samples) in tensors of its own."""
        entries = tuple(
            replace(
                entry,
                layers=tuple(tuple(x[samples].clone() for x in qkv) for qkv in entry.layers),
                x0=entry.x0[samples].clone(),
            )
            for entry in self.entries
        )
        return replace(self, entries=entries)

    def cut(self, passes: int) -> Tape:
        """Its first passes."""
        return replace(self, entries=self.entries[:passes], recorded={})

    def session(self, policy: CachePolicy, **settings: Any) -> CacheSession:
        """A fresh session for it, with the reference tables that the policy needs.

        Args:
            policy: What decides.
            settings: ``backend``, ``buffers``, ``watch``, ``tables``, ``inputs`` of a session.
        """
        given = {"context_frames": self.context, "keys": self.keys} | settings
        if policy.needs and "tables" not in given:
            given["tables"] = self.tables(policy.needs)
        if policy.inputs and "inputs" not in given:
            given["inputs"] = {"pose": [camera(seed, self.frames) for seed in self.seeds]}
        return CacheSession(self.geometry, policy, self.seeds, **given)

    def tables(self, needs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Reference tables of the full cache on this tape, by name, one per sample."""
        if (known := self.recorded.get(repr(needs))) is not None:
            return known
        chunks, recording = 1 + max(step.chunk for step in self.steps), recorders(needs)
        most = max(Counter((s.chunk, s.namespace) for s in self.steps).values())
        clips = [
            Clip(key, seed, self.frames, chunks, self.geometry, most)
            for key, seed in zip(self.keys, self.seeds, strict=True)
        ]
        for recorder in recording:
            recorder.begin(clips)
        self.play(FULL, watch=together(recording))
        made = {own.name: [own.table(i) for i in range(self.batch)] for own in recording}
        self.recorded[repr(needs)] = made
        return made

    def play(self, policy: CachePolicy | Cache, **settings: Any) -> list[Tensor]:
        """Play it to the end; the outputs of all layers in all passes, in order.

        Args:
            policy: A policy, which gets a fresh session; or a session or twin.
            settings: See :meth:`session`.
        """
        on = self.session(policy, **settings) if isinstance(policy, CachePolicy) else policy
        return [out for _, found in self.running(on) for out in found]

    def running(self, on: Cache) -> Iterator[tuple[Pass, list[Tensor]]]:
        """Play it pass by pass; each pass with the outputs of its layers, once it is closed."""
        for entry in self.entries:
            with torch.inference_mode(False), torch.no_grad():
                for event in entry.events:
                    for namespace, sample, answer in on.event(event, entry.step):
                        here = replace(entry.step, namespace=namespace)
                        self._rebuild(on, sample, answer, here)
                found = self.through(on, entry.step, entry.layers)
                step = entry.step
                show(on, entry)
                for sample, answer in on.finish(step):
                    self._rebuild(on, sample, answer, step)
            yield step, found

    def through(self, on: Cache, step: Pass, layers: Layers) -> list[Tensor]:
        """One pass through all layers, not closed yet."""
        return [on.attend(layer, *qkv, step) for layer, qkv in enumerate(layers)]

    def _rebuild(self, on: Cache, sample: int, answer: Rebuild, step: Pass) -> None:
        """Past frames go through the layers again, with what they had when they became final."""
        aside = on.clear(sample, step.namespace, answer)
        chunk = self.geometry.chunk or len(step.frames)
        times = answer.times or tuple(map(float, answer.frames))
        for part in answer.passes(chunk):
            ids, own = answer.frames[part], times[part]
            still = (0.0,) * len(ids)
            again = Pass("prefill", ids, still, step.chunk, final=ids, next_chunk=step.next_chunk)
            again = replace(again, namespace=step.namespace, times=own, samples=(sample,))
            again = replace(again, rebuild=True)
            self.through(on, again, self._again(sample, ids, step.namespace))
            on.finish(again)
        on.rebuilt(sample, step, answer, aside)

    def _again(self, sample: int, ids: Sequence[int], namespace: str) -> Layers:
        """Queries, keys and values of frames of one sample when they became final."""
        tokens, found = self.geometry.tokens, {}
        for entry in self.entries:
            if entry.step.namespace == namespace:
                own = {f: entry.step.frames.index(f) * tokens for f in entry.step.final}
                found |= {f: (entry.layers, slice(at, at + tokens)) for f, at in own.items()}
        each, one = [found[frame] for frame in ids], slice(sample, sample + 1)
        return tuple(
            tuple(torch.cat([own[layer][i][one, at] for own, at in each], 1) for i in range(3))
            for layer in range(self.geometry.layers)
        )


def camera(seed: int, frames: int) -> Tensor:
    """A camera that wanders and turns about: its pose in the world, ``[F, 4, 4]``."""
    rng = torch.Generator().manual_seed(seed)
    turn, move = torch.randn(frames, generator=rng).cumsum(0), torch.randn(frames, 3, generator=rng)
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, 0, 0] = pose[:, 2, 2] = turn.cos()
    pose[:, 0, 2], pose[:, 2, 0] = turn.sin(), -turn.sin()
    pose[:, :3, 3] = move.cumsum(0)
    return pose


def show(on: Cache, entry: Entry) -> None:
    """Show a session the estimate of a denoising pass, and latents that are final after it."""
    step = entry.step
    if step.phase == "denoise":
        _tell(on, "on_prediction", step, step.timesteps[0], entry.x0)
    if step.final:
        low = step.frames.index(step.final[0])
        _tell(on, "on_final", step, entry.x0[:, low : low + len(step.final)])


def _tell(on: Any, name: str, *given: Any) -> None:
    if (told := getattr(on, name, None)) is not None:  # a twin has no latents
        told(*given)


# -- passes ----------------------------------------------------------------------------------


def random_tape(
    steps: Sequence[Pass] | None = None,
    *,
    layers: int = 2,
    heads: int = 3,
    head_dim: int = 12,
    grid: tuple[int, int] = (2, 3),
    batch: int = 1,
    events: Sequence[Event] = (),
    train_horizon: int = 12,
    gain: float = 2.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tape:
    """A tape of random queries, keys and values.

    Args:
        steps: From :func:`chunked`, :func:`rolling`, :func:`without_commits` or :func:`guided`;
            eight chunks of three frames where not given.
        layers: Number of layers.
        heads: Number of heads.
        head_dim: Width of a head; even, and at least 6.
        grid: Token rows and columns of a frame.
        batch: Number of samples.
        events: Each happens before the first pass over its frame.
        train_horizon: Of the model.
        gain: Multiplies the queries: above 1 attention is sharper.
        dtype: Of what goes in.
        seed: Of all that is drawn.
    """
    steps = chunked((3,) * 8) if steps is None else steps
    flight = max(len(step.frames) for step in steps)
    geometry = Geometry(
        layers,
        heads,
        head_dim,
        grid,
        Rotary(head_dim),
        train_horizon,
        element_size=torch.empty((), dtype=dtype).element_size(),
        chunk=max(len(step.final) for step in steps),
        flight=flight,
        branches=len({step.namespace for step in steps}),
    )
    rng, coming, entries = torch.Generator().manual_seed(seed), list(events), []
    for step in steps:
        count = len(step.frames)
        shape = (batch, count * geometry.tokens, heads, head_dim)
        drawn = []
        for _ in range(layers):
            q, k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in range(3))
            drawn.append((gain * q, k, v))
        x0 = torch.randn(batch, count, 2, *grid, generator=rng)
        now = tuple(event for event in coming if event.frame <= step.frames[-1])
        coming = [event for event in coming if event not in now]
        entries.append(Entry(step, tuple(drawn), x0, now))
    seeds = tuple(stable_seed(seed, sample) for sample in range(batch))
    return Tape(geometry, tuple(entries), seeds, tuple(f"prompt {i}" for i in range(batch)))


class Recorder(CacheSession):
    """A session that notes what goes through it; rebuilds are left out, tapes repeat them."""

    def __init__(self, *settings: Any, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.entries: list[Entry] = []
        self._layers: list[tuple[Tensor, Tensor, Tensor]] = []
        self._events: list[Event] = []
        self._x0: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """As any session."""
        if not step.rebuild and step.mode != "scratch":
            self._layers.append(tuple(x.detach().clone() for x in (q, k, v)))
        return super().attend(layer, q, k, v, step)

    def event(self, event: Event, step: Pass) -> list[tuple[str, int, Rebuild]]:
        """As any session."""
        self._events.append(event)
        return super().event(event, step)

    def on_prediction(self, step: Pass, timestep: float, x0: Tensor) -> None:
        """As any session."""
        if step.mode != "scratch":
            self._x0 = x0.detach().clone()
        super().on_prediction(step, timestep, x0)

    def on_final(self, step: Pass, x0: Tensor) -> None:
        """As any session."""
        if step.phase != "denoise":
            self._x0 = x0.detach().clone()
        super().on_final(step, x0)

    def finish(self, step: Pass) -> list[tuple[int, Rebuild]]:
        """As any session."""
        if not step.rebuild:
            self.entries.append(Entry(step, tuple(self._layers), self._x0, tuple(self._events)))
            self._layers, self._events = [], []
        return super().finish(step)

    def tape(self) -> Tape:
        """All that was noted."""
        return Tape(
            self.geometry,
            tuple(self.entries),
            self.seeds,
            tuple(map(str, self.keys)),
            self.context_frames,
        )


def recorded_tape(
    model: VideoModel,
    policy: CachePolicy,
    prompts: str | Sequence[str],
    frames: int,
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[Tape, Rollout]:
    """A tape of what a rollout of a real model puts into its cache.

    Args:
        model: From :func:`lightning_kv.load_model`.
        policy: What the cache does meanwhile.
        prompts: One prompt, or several of equal length.
        frames: Latent frames.
        seed: Of the noise.
        options: Others of :func:`lightning_kv.rollout.rollout`: ``events``, ``sampler``, ...

    Returns:
        The tape, and the rollout it was recorded from.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    given = options.get("context")
    session = Recorder(
        model.network.geometry(options.get("latent_size")),
        policy,
        [stable_seed(seed, prompt) for prompt in prompts],
        context_frames=0 if given is None else given.shape[1],
        keys=prompts,
    )
    found = rollout(
        model, policy, prompts, frames, seed=seed, session=session, decode=False, **options
    )
    return session.tape(), found
