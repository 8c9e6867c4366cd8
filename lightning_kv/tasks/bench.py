"""Speed and memory of rollouts at real sizes, with random weights: they do not change the time.

The first chunk warms up and is dropped. Clocks are CUDA events, or the processor's on a CPU, and
the device is waited for at the end of a chunk only. Policies take turns, so that a machine whose
pace drifts favours none of them, and medians over the repeats are reported.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import rotate_by
from lightning_kv.cache.session import CacheSession, Cost
from lightning_kv.models.precision import known_profile
from lightning_kv.models.samplers import Sampler, Steps, sampler_of
from lightning_kv.models.sizes import PRESETS, parameters
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.presets import load_policy, preset, unknown
from lightning_kv.report.table import format_bytes
from lightning_kv.rollout import rollout
from lightning_kv.tasks.clock import read_size

CONFIGS = {
    "wan-1.3b": PRESETS["wan-1.3b"],
    "wan-14b": PRESETS["wan-14b"],
    "tiny": WanConfig(dim=64, ffn_dim=128, layers=2, heads=2, text_dim=64, latent_size=(8, 8)),
}
POLICIES = ("full", "sink-window@9f", "sliding-window@18f")
REFERENCE, PLAIN = "full", "hard-wired cache"
SETTLED = 5  # chunk, counted from 1, after which memory should not grow any more


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Args:
        preset: Size of the network: ``wan-1.3b``, ``wan-14b`` or ``tiny`` (for a CPU).
        size: ``HEIGHTxWIDTH`` in pixels; the preset's where not given.
        policies: ``NAME[@BUDGET]`` or YAML files; others are compared with ``full``.
        chunks: Chunks of each rollout; the first is dropped.
        steps: Denoising steps per chunk; the preset's where not given.
        precision: Profile: ``float32``, ``reference`` or ``fast``.
        device: ``cuda`` or ``cpu``.
        repeats: Rollouts of each policy.
        seed: Of weights, text and noise.
    """

    preset: str = "wan-1.3b"
    size: str | None = None
    policies: tuple[str, ...] = POLICIES
    chunks: int = 10
    steps: int | None = None
    precision: str = "fast"
    device: str = "cuda"
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in CONFIGS:
            raise ValueError(unknown("size of a network", self.preset, CONFIGS))
        for name, least in (("chunks", 2), ("repeats", 1), ("steps", 1)):
            if (given := getattr(self, name)) is not None and given < least:
                why = "the first warms up and is dropped" if least == 2 else "nothing would run"
                raise ValueError(f"--{name} {given}: {why}. Give {least} or more.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch finds no CUDA GPU here. Use --device cpu, with --preset tiny."
            )
        if not self.policies or len(set(self.policies)) < len(self.policies):
            given = ",".join(self.policies)
            raise ValueError(f"--policies {given!r}: give one or more, each of them once.")

    @property
    def config(self) -> WanConfig:
        """The network's. Which noise levels there are is all the same, their number is not."""
        config = CONFIGS[self.preset]
        count = self.steps or len(config.timesteps)
        return replace(config, timesteps=tuple(1000 - 1000 * i / count for i in range(count)))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and cached rows."""
        return known_profile(self.precision).dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the network's weights."""
        return parameters(self.config) * self.dtype.itemsize


class PlainCache:
    """A hard-wired cache in the session's place: one buffer per layer, made once and only filled.

    Nobody decides and nothing is counted: what ``full`` takes beyond it is the price of policies.
    """

    def __init__(self, geometry: Geometry, frames: int) -> None:
        self.geometry, self.rows, self.costs = geometry, frames * geometry.tokens, [Cost()]
        self.lanes: dict[Any, Any] = {}  # nothing that could be asked what it holds
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._turns: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention of queries ``[B, T, H, D]`` to every frame so far."""
        cos, sin = self._angles(step, q)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layer not in self._buffers:
            room = (*k.shape[:2], self.rows, k.shape[3])
            self._buffers[layer] = k.new_empty(room), k.new_empty(room)
        low = step.start * self.geometry.tokens
        keys, values = (x[:, :, : low + k.shape[2]] for x in self._buffers[layer])
        keys[:, :, low:], values[:, :, low:] = rotate_by(k, cos, sin), v
        return scaled_dot_product_attention(rotate_by(q, cos, sin), keys, values).transpose(1, 2)

    def finish(self, step: Pass) -> list[Any]:
        """Nothing to decide: the rows of a commit pass lie where they stay."""
        return []

    def _angles(self, step: Pass, like: Tensor) -> tuple[Tensor, Tensor]:
        if step.query_times not in self._turns:
            height, width = self.geometry.grid
            axes = (torch.tensor(step.query_times), torch.arange(height), torch.arange(width))
            places = torch.cartesian_prod(*(axis.double().to(like.device) for axis in axes))
            angles = self.geometry.rotary.angles(*places.unbind(-1))
            work = torch.promote_types(like.dtype, self.geometry.rotary.work)
            self._turns = {step.query_times: (angles.cos().to(work), angles.sin().to(work))}
        return self._turns[step.query_times]


@dataclass
class Run:
    """One rollout: times by pass, and what was held.

    A pass lasts from when the sampler is asked for it until the session has closed it, so the
    noise before it counts for it.

    Args:
        device: Where the network is.
        session: Whose cache it is; asked for its frames when a chunk opens, off the clock.
        denoise: Seconds of each chunk.
        commit: Seconds of each chunk.
        frames: History frames of each chunk.
        allocated: Bytes at the end of each chunk; none on a CPU.
        held: Bytes of the cache while each chunk is denoised.
        peaks: Most bytes, see :func:`peaks`.
        latents: What was made; None where memory ran out.
        failure: What torch said when memory ran out.
    """

    device: torch.device
    session: Any
    denoise: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    latents: Tensor | None = None
    failure: str = ""

    @property
    def seconds(self) -> list[float]:
        """Of each chunk."""
        return [a + b for a, b in zip(self.denoise, self.commit, strict=True)]

    def timed(self, sampler: Sampler) -> Sampler:
        """The same sampler with a mark at both ends of every pass."""

        def passes(*given: Any) -> Steps:
            steps, estimate, laps = sampler(*given), None, []
            while True:
                began = self._mark()
                try:
                    step, x = steps.send(estimate)
                except StopIteration:
                    return
                estimate = yield step, x
                laps.append((step.phase, began, self._mark()))
                if step.opens:
                    self.frames.append(held_frames(self.session))
                if step.phase == "commit":
                    self._close(laps)
                    laps = []

        return passes

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self, laps: list[tuple[str, Any, Any]]) -> None:
        """Wait for the device and read the marks of a chunk."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            self.allocated.append(torch.cuda.memory_allocated(self.device))
        for phase, seconds in (("denoise", self.denoise), ("commit", self.commit)):
            own = [(began, ended) for name, began, ended in laps if name == phase]
            seconds.append(sum(a.elapsed_time(b) / 1000 if cuda else b - a for a, b in own))


class Bench:
    """A network with random weights and text, and the policies to measure it under."""

    def __init__(self, options: BenchOptions) -> None:
        """Raises ValueError for a size, policy, precision or length that does not fit."""
        self.options, self.config = options, options.config
        self.size, self.device = read_size(options.size, self.config), torch.device(options.device)
        self.frames = options.chunks * self.config.chunk
        self.policies = {spec: load_policy(spec) for spec in options.policies}
        size = options.dtype.itemsize
        self.geometry = replace(self.config.geometry(self.size), element_size=size)
        for policy in self.policies.values():
            policy.check(self.geometry, self.config.chunk, self.frames)
            CacheSession(self.geometry, policy.start)  # refuses needs that nothing here can meet
        self.model = random_model(options)

    def run(self) -> dict[str, Any]:
        """Measure; plain data: ``policies`` by name (:meth:`row`), ``overhead`` of the session."""
        rivals = [*self.policies, *([PLAIN] if REFERENCE in self.policies else [])]
        runs: dict[str, list[Run]] = {name: [] for name in rivals}
        for _ in range(self.options.repeats):
            for name, done in runs.items():
                if not (done and done[-1].failure):
                    done.append(self.once(name))
        rows = {name: self.row(runs[name]) for name in self.policies}
        good = {
            n: row["ms_per_chunk"]["median"] for n, row in rows.items() if row["status"] == "ok"
        }
        for name, own in good.items():
            rows[name]["ratio_to_full"] = own / good[REFERENCE] if REFERENCE in good else None
        return {"policies": rows, "overhead": overhead(runs)}

    def once(self, name: str) -> Run:
        """One rollout, under a policy or with the hard-wired cache.

        Raises:
            ValueError: The random weights gave numbers that are not finite.
        """
        release(self.device)
        geometry = self.model.network.geometry(self.size)
        policy = self.policies.get(name) or preset(REFERENCE)
        session: Any = CacheSession(geometry, policy.start, (self.options.seed,))
        run = Run(self.device, PlainCache(geometry, self.frames) if name == PLAIN else session)
        try:
            made = rollout(
                self.model,
                policy,
                "random text",
                self.frames,
                seed=self.options.seed,
                latent_size=self.size,
                sampler=run.timed(sampler_of(self.config)),
                session=run.session,
                decode=False,
            )
            run.latents, run.peaks = made.latents.float().cpu(), peaks(self.device)
        except RuntimeError as error:
            run.failure = out_of_memory(error)
        run.held, run.session = run.session.costs[0].chunk_bytes, None  # frees its cache
        if run.latents is not None and not bool(run.latents.isfinite().all()):
            raise ValueError(
                f"Random weights of {self.options.preset} in {self.options.precision} gave numbers "
                f"that are not finite under {name!r}. Give another --seed, or --precision float32."
            )
        return run

    def row(self, runs: list[Run]) -> dict[str, Any]:
        """What is reported of a policy.

        Milliseconds and frames per second are those of denoising and commit passes, without the
        first chunk; each chunk's time is the median of the repeats, but ``worst`` is the slowest.
        ``kv`` is about the last chunk while it is denoised: ``frames`` held (it included, mean of
        all heads), their ``bytes``, and by the formula for plain keys and values.
        """
        last, chunk = runs[-1], self.config.chunk
        frames = sum(last.frames[-1:]) + chunk
        held, formula = last.held, kv_bytes(self.geometry, frames)
        if last.failure:
            why = f"{last.failure} in chunk {len(last.seconds) + 1} of {self.options.chunks}; "
            why += f"weights take {format_bytes(self.options.weight_bytes)}, keys and values of "
            why += f"{frames:g} frames {format_bytes(formula)}"
            return {"status": "out of memory", "reason": why}
        each = middle(run.seconds for run in runs)
        times = spread(each) | {"worst": 1000 * max(max(run.seconds[1:]) for run in runs)}
        times["denoise"] = 1000 * median(middle(run.denoise for run in runs)[1:])
        times["commit"] = 1000 * median(middle(run.commit for run in runs)[1:])
        rate = chunk * len(each[1:]) / sum(each[1:])
        kv = {"frames": frames, "bytes": held[-1], "formula_bytes": formula}
        return {
            "status": "ok",
            "latent_fps": rate,
            "pixel_fps": rate * self.config.stride[0],
            "ms_per_chunk": times,
            **last.peaks,
            "allocated_growth": growth(last.allocated),
            "kv": kv | {"ratio": held[-1] / formula, "growth": growth(held), "chunk_bytes": held},
        }


def overhead(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Time of ``full`` over that of the hard-wired cache, and how far their latents are apart.

    ``repeats`` are medians over the chunks of both, first ones dropped; ``ratio`` is theirs.
    """
    pairs = list(zip(runs.get(REFERENCE, []), runs.get(PLAIN, []), strict=False))
    if not pairs or any(run.failure for pair in pairs for run in pair):
        why = "memory ran out" if pairs else f"{REFERENCE!r} is not among the policies"
        return {"status": "not measured", "reason": why}
    ratios, apart = [], []
    for full, plain in pairs:
        seconds = zip(full.seconds[1:], plain.seconds[1:], strict=True)
        ratios.append(median(a / b for a, b in seconds))
        apart.append(float((full.latents - plain.latents).abs().max()))
    ratio = {"ratio": median(ratios), "repeats": ratios}
    return {"status": "ok"} | ratio | {"largest_difference": max(apart)}


def random_model(options: BenchOptions) -> VideoModel:
    """A network with fresh weights, made where it runs and in its precision, and random text."""
    config, device, before = options.config, torch.device(options.device), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []), device:
        torch.manual_seed(options.seed)
        torch.set_default_dtype(options.dtype)
        try:
            network = CausalWan(config).cast(options.precision).eval().requires_grad_(False)
            text = torch.randn(1, config.text_len, config.text_dim)
        finally:
            torch.set_default_dtype(before)
    return VideoModel(network, None, lambda prompts: text)


def kv_bytes(geometry: Geometry, frames: float) -> int:
    """Bytes of plain keys and values of so many frames."""
    row = 2 * geometry.head_dim * geometry.element_size
    return round(row * geometry.layers * geometry.heads * geometry.tokens * frames)


def held_frames(session: Any) -> float:
    """Committed and archived frames of a session, mean of all layers and heads."""
    cells = [cell for lane in session.lanes.values() for cell in lane.cells]
    groups = [g for cell in cells for rows in (cell.memory, cell.archive) for g in rows.groups]
    of = session.geometry
    return sum(len(g) * len(g.heads) for g in groups) / (of.layers * of.heads * of.tokens)


def middle(repeats: Iterable[list[float]]) -> list[float]:
    """Median of the repeats, chunk by chunk."""
    return [median(same) for same in zip(*repeats, strict=True)]


def spread(seconds: list[float]) -> dict[str, Any]:
    """Milliseconds of chunks; the first is left out of the median and of the worst."""
    each = [1000 * second for second in seconds]
    found = {"median": median(each[1:]), "first": each[0], "last": each[-1]}
    return found | {"worst": max(each[1:]), "all": each}


def growth(held: list[int]) -> float | None:
    """Share that bytes grow by from chunk 5 to the last; None where there are no more chunks."""
    return held[-1] / held[SETTLED - 1] - 1 if len(held) > SETTLED else None


def release(device: torch.device) -> None:
    """Let go of what earlier work left, and count its bytes anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int | None]:
    """Most bytes since :func:`release`; None on a CPU, where torch does not count."""
    found = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return {f"peak_{x}_bytes": found.get(f"{x}_bytes.all.peak") for x in ("allocated", "reserved")}


def out_of_memory(error: RuntimeError) -> str:
    """What torch said when memory ran out; any other error is raised again."""
    said = re.search(r"tr(ied|y) to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    if not said and not isinstance(error, torch.OutOfMemoryError):
        raise error
    return said[0] if said else str(error)
