"""Speed and memory of rollouts at real sizes, with random weights: they do not change the time.

The first chunk warms up and is dropped. Clocks are CUDA events, or the processor's on a CPU, and
the device is waited for at the end of a chunk only. Policies take turns, so that a machine whose
pace drifts favours none of them, and medians over the repeats are reported.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import rotate_by
from lightning_kv.cache.session import CacheSession, Cost
from lightning_kv.models.precision import known_profile
from lightning_kv.models.samplers import Sampler, sampler_of
from lightning_kv.models.sizes import PRESETS, parameters
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import load_policy, preset
from lightning_kv.rollout import rollout
from lightning_kv.tasks.benchmark.timing import Run
from lightning_kv.tasks.rollouts.lengths import read_size
from lightning_kv.utilities.formatting import format_bytes
from lightning_kv.utilities.nearest import unknown

CONFIGS = {
    "wan-1.3b": PRESETS["wan-1.3b"],
    "wan-14b": PRESETS["wan-14b"],
    "tiny": WanConfig(dim=64, ffn_dim=128, layers=2, heads=2, text_dim=64, latent_size=(8, 8)),
}
POLICIES = ("full", "sink-window@9f", "sliding-window@18f")
REFERENCE, PLAIN = "full", "hard-wired cache"
STEADY = 5  # chunk, counted from 1, after which memory should not grow any more


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
        sampler: ``few-step`` or ``rolling``; the preset's where not given.
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
    sampler: str | None = None

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
        levels = tuple(1000 - 1000 * i / count for i in range(count))
        return replace(config, timesteps=levels, sampler=self.sampler or config.sampler)

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

    def on_prediction(self, step: Pass, timestep: float, x0: Tensor) -> None:
        """Nobody looks."""

    def on_final(self, step: Pass, x0: Tensor) -> None:
        """Nobody looks."""

    def held_frames(self) -> float:
        """Nobody counts."""
        return 0.0

    def _angles(self, step: Pass, like: Tensor) -> tuple[Tensor, Tensor]:
        if step.query_times not in self._turns:
            height, width = self.geometry.grid
            axes = (torch.tensor(step.query_times), torch.arange(height), torch.arange(width))
            places = torch.cartesian_prod(*(axis.double().to(like.device) for axis in axes))
            angles = self.geometry.rotary.angles(*places.unbind(-1))
            work = torch.promote_types(like.dtype, self.geometry.rotary.work)
            self._turns = {step.query_times: (angles.cos().to(work), angles.sin().to(work))}
        return self._turns[step.query_times]


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
            CacheSession(self.geometry, policy)  # refuses needs that nothing here can meet
        self.model = random_model(options)

    def run(self) -> dict[str, Any]:
        """Measure; plain data: ``policies`` by name (:meth:`row`), ``overhead`` of the session."""
        rivals = [*self.policies, *([PLAIN] if REFERENCE in self.policies else [])]
        runs: dict[str, list[Run]] = {name: [] for name in rivals}
        for _ in range(self.options.repeats):
            for name, done in runs.items():
                if not (done and done[-1].failure):
                    done.append(self.once(name))
        return self.report(runs)

    def report(self, runs: dict[str, list[Run]]) -> dict[str, Any]:
        """What :meth:`run` gives, of rollouts that were made; policies without any are left out."""
        rows = {name: self.row(runs[name]) for name in self.policies if runs.get(name)}
        good = {
            n: row["ms_per_chunk"]["median"] for n, row in rows.items() if row["status"] == "ok"
        }
        for name, own in good.items():
            rows[name]["ratio_to_full"] = own / good[REFERENCE] if REFERENCE in good else None
        return {"policies": rows, "overhead": overhead(runs)}

    def once(self, name: str, around: Callable[[Sampler], Sampler] | None = None) -> Run:
        """One rollout, under a policy or with the hard-wired cache.

        ``around`` puts the sampler into another one that looks on, see
        :func:`lightning_kv.tasks.benchmark.timing.looked_at`.

        Raises:
            ValueError: The random weights gave numbers that are not finite.
        """
        release(self.device)
        geometry = self.model.network.geometry(self.size)
        policy = self.policies.get(name) or preset(REFERENCE)
        session: Any = CacheSession(geometry, policy, (self.options.seed,))
        run = Run(self.device, PlainCache(geometry, self.frames) if name == PLAIN else session)
        sampler = run.timed(sampler_of(self.config))
        try:
            made = rollout(
                self.model,
                policy,
                "random text",
                self.frames,
                seed=self.options.seed,
                latent_size=self.size,
                sampler=around(sampler) if around else sampler,
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
        all heads), their ``bytes``, and by the formula for plain keys and values. ``flop_limit``
        is how many times fewer operations the timed chunks take than under ``full``: no kernel
        makes a policy that reads less faster than that.
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
            **self._operations(last, rate),
            **last.peaks,
            "allocated_growth": growth(last.allocated),
            "kv": kv | {"ratio": held[-1] / formula, "growth": growth(held), "chunk_bytes": held},
        }

    def _operations(self, run: Run, rate: float) -> dict[str, float | None]:
        """Of the timed chunks; None where nobody counted rows."""
        timed = run.work[1:]
        own = sum(work.flops(self.config, work.read) for work in timed)
        full = sum(work.flops(self.config, work.history) for work in timed)
        speed = own / len(timed) * rate / self.config.chunk if timed else None
        return {"flop_limit": full / own if timed else None, "flops_per_second": speed}


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
    return held[-1] / held[STEADY - 1] - 1 if len(held) > STEADY else None


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
