"""How much memory is alive at the worst moment, beside what a policy holds?

    python tools/peak_memory.py [--layers 30] [--tokens 24]

Attention alone, on the CPU: random queries, keys and values go through a cache of 30 layers, and
every allocation of torch is followed, transients included. Shown, for both settings of `buffers`:
what is held, one layer's work buffer (its copies, or the rows of a layer that a decision copies),
the peak, the peak over both together, and the time. The last line is the transient of scoring one
layer of a full 480p cache as h2o does.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
import bench_policies as bench

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import Rotary
from lightning_kv.cache.session import CacheSession
from lightning_kv.cache.view import PassView
from lightning_kv.policies.registry import load_policy

WINDOW = {"part": "window", "budget": "9f"}
POLICIES: dict[str, Any] = {
    "sliding-window@9f": "sliding-window@9f",
    "sink-window@9f": "sink-window@9f",
    "infinity-rope@9f": "infinity-rope@9f",
    "focused-forcing@6f": "focused-forcing@6f",
    "focused once per chunk": {
        "name": "once",
        "select": {
            "part": "focused",
            "budget": "6f",
            "per_query_frame": False,
            "refresh": "chunk",
        },
    },
    "int4 window@9f": {
        "name": "int4",
        "retain": WINDOW,
        "precision": {"part": "aged", "codec": "int4", "age": 3},
    },
    "h2o@9f": "h2o@9f",
}


@dataclass(frozen=True)
class Peak:
    """Bytes, and seconds of a steady chunk."""

    name: str
    buffers: str
    held: int
    work: int
    peak: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Peak over what is held and one layer's work buffer."""
        return self.peak / (self.held + self.work)


def living(events: Any) -> int:
    """The most bytes alive, from the profiler's allocations and releases."""
    alive = most = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def measure(name: str, spec: Any, geometry: Geometry, buffers: str, chunks: int = 10) -> Peak:
    """Follow one policy."""
    tape, seconds = bench.Tape(geometry, 0), 0.0
    rows = {
        (step.chunk, step.phase, step.step): (step, tape.rows(step))
        for chunk in range(chunks)
        for step in bench.passes(chunk, 2, False)
    }
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        session = CacheSession(geometry, load_policy(spec), buffers=buffers)
        for step, own in rows.values():
            began = time.perf_counter()
            bench.run(session, step, own)
            seconds = time.perf_counter() - began + (seconds if not step.opens else 0.0)
        held = session.held_bytes(0)
    layer = 2 * geometry.heads * geometry.head_dim * 4 * geometry.tokens
    longest = max(max(store.memory.lengths) for store in session.samples[0].stores["cond"])
    work = max(session.work.held_bytes, layer * (longest // geometry.tokens + bench.CHUNK))
    events = watched.profiler.kineto_results.events()
    return Peak(name, buffers, held, work, living(events), seconds)


def scoring(heads: int = 12, frames: int = 21, grid: tuple[int, int] = (30, 52)) -> int:
    """Bytes that scoring one layer takes for a moment, as h2o does it at 480p."""
    geometry = Geometry(1, heads, 128, grid, Rotary(128), 21, chunk=3, flight=3)
    session = CacheSession(geometry, load_policy(f"h2o@{frames}f"))
    rng = torch.Generator().manual_seed(0)
    step = Pass("prefill", tuple(range(frames - 3)), (0.0,) * (frames - 3), 0, final=())
    step = replace(step, final=step.frames, opens=True, next_chunk=3)
    shape = (1, geometry.tokens * (frames - 3), heads, 128)
    with torch.no_grad():
        k = torch.randn(shape, generator=rng, dtype=torch.float32)
        store = session.samples[0]._layers("cond", k[0].transpose(0, 1))[0]
        store.write(k[0].transpose(0, 1), k[0].transpose(0, 1))
        store.commit(slice(0, shape[1]), step.final, step.query_times)
        frames_now = (frames - 3, frames - 2, frames - 1)
        last = Pass("commit", frames_now, (0.0,) * 3, 1, final=frames_now, next_chunk=3)
        own = torch.randn(heads, 3 * geometry.tokens, 128, generator=rng)
        store.write(own, own)
        rows = {"read": own, "raw": own, "value": own}
        view = PassView(own, own, rows, **session.samples[0]._settings(0, last))
        part, state = session.policy.retain, {}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            part.observe(view, state)
    return living(watched.profiler.kineto_results.events())


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=24, choices=sorted(bench.GRIDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    geometry = Geometry(
        given.layers, 12, 64, bench.GRIDS[given.tokens], Rotary(64), 21, chunk=3, flight=3
    )
    mib = 2**20
    with torch.no_grad():
        for name, spec in POLICIES.items():
            for buffers in ("remake", "keep"):
                one = measure(name, spec, geometry, buffers)
                sys.stdout.write(
                    f"{name:24} {buffers:7} held {one.held / mib:7.2f} MiB, work "
                    f"{one.work / mib:5.2f}, peak {one.peak / mib:7.2f}, ratio {one.ratio:.3f}, "
                    f"{1000 * one.seconds:.0f} ms\n"
                )
    sys.stdout.write(f"scoring a layer at 480p: {scoring() / 1e6:.0f} MB\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
