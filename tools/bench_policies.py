"""What does deciding cost? Each policy against a dense window that reads as many rows.

    python tools/bench_policies.py --tokens 390 --json ratios.json

Attention alone, on one thread of the CPU: random queries, keys and values go through two caches in
turns, pass by pass, so that a machine whose pace drifts favours neither. A ratio is that of the
times of one chunk (its denoising passes, its commit pass, its decisions) once a window of 21 frames
is full; a focused selection holds that window and reads 6 of its 18 history frames. Shown are the
median and a 95 % interval of it (bootstrap over the chunks). `full` is compared with a cache that
is hard-wired into one buffer per layer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import Rotary
from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.registry import load_policy
from lightning_kv.tasks.benchmark.rollouts import PlainCache

CHUNK, FULL = 3, 18  # frames: of a chunk, and of the history of a window of 21
HARD = "hard-wired cache"
GRIDS = {390: (15, 26), 160: (10, 16), 1560: (30, 52), 24: (4, 6)}


def shares(layers: int, heads: int) -> dict[str, Any]:
    """A table budget of other lengths in neighbouring heads, 9 frames on average."""
    each = [[1 / 3 * (2 + (head + layer) % 3) for head in range(heads)] for layer in range(layers)]
    return {"part": "table", "amount": "9f", "shares": each}


def rivals(layers: int, heads: int) -> dict[str, tuple[Any, Any]]:
    """Policies, and what they are compared with."""
    focused = {"part": "focused", "budget": "6f"}
    held = {"part": "window", "sink": 3, "budget": f"{FULL}f"}
    once = focused | {"per_query_frame": False, "refresh": "chunk"}
    table = {"part": "window", "budget": shares(layers, heads)}
    moved = {"retain": {"part": "window", "budget": "9f"}, "positions": "contiguous"}
    coded = {
        "retain": {"part": "window", "budget": "9f"},
        "precision": {"part": "aged", "codec": "int4", "age": 3},
    }
    return {
        "full": ("full", HARD),
        "focused once per chunk and head": (
            {"name": "once", "retain": held, "select": once},
            "sliding-window@6f",
        ),
        "focused-forcing@6f (paper)": (
            {"name": "paper", "retain": held, "select": focused},
            "sliding-window@6f",
        ),
        "future-forcing@9f": ("future-forcing@9f", "sliding-window@9f"),
        "h2o@9f": ("h2o@9f", "sliding-window@9f"),
        "table-budget window": ({"name": "table", "retain": table}, "sliding-window@9f"),
        "contiguous window@9f": ({"name": "moved", **moved}, "sliding-window@9f"),
        "int4 window@9f": ({"name": "coded", **coded}, "sliding-window@9f"),
    }


class Tape:
    """Random queries, keys and values; the same for everybody who asks for a pass."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        self.geometry, self.seed = geometry, seed

    def rows(self, step: Pass) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of every layer."""
        rng = torch.Generator().manual_seed(self.seed + 100 * step.chunk + step.step)
        of = self.geometry
        shape = (1, len(step.frames) * of.tokens, of.heads, of.head_dim)
        return [
            tuple(torch.randn(shape, generator=rng) for _ in range(3)) for _ in range(of.layers)
        ]


def passes(chunk: int, steps: int, filling: bool) -> list[Pass]:
    """Of one chunk; one pass where the history is only filled."""
    frames, flat = tuple(range(chunk * CHUNK, (chunk + 1) * CHUNK)), (0.0,) * CHUNK
    noisy = [
        Pass("denoise", frames, (500.0,) * CHUNK, chunk, i, opens=i == 0, next_chunk=CHUNK)
        for i in range(0 if filling else steps)
    ]
    last = Pass("commit", frames, flat, chunk, 0, frames, filling, CHUNK)
    return [*noisy, last]


def run(on: Any, step: Pass, rows: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Seconds of one pass."""
    began = time.perf_counter()
    for layer, (q, k, v) in enumerate(rows):
        on.attend(layer, q, k, v, step)
    on.finish(step)
    return time.perf_counter() - began


def ratios(first: Any, second: Any, geometry: Geometry, given: argparse.Namespace) -> list[float]:
    """Time of each steady chunk over that of the other cache."""
    tape, found = Tape(geometry, given.seed), []
    filled = FULL // CHUNK + 1
    for chunk in range(filled + given.chunks):
        spent = [0.0, 0.0]
        for number, step in enumerate(passes(chunk, given.steps, chunk < filled)):
            rows = tape.rows(step)
            order = (0, 1) if (chunk + number) % 2 else (1, 0)
            for which in order:
                spent[which] += run((first, second)[which], step, rows)
        if chunk >= filled:
            found.append(spent[0] / spent[1])
    return found[1:]


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % of the bootstrap's medians."""
    rng = random.Random(seed)
    found = sorted(median(rng.choices(values, k=len(values))) for _ in range(2000))
    return found[50], found[1949]


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=390, choices=sorted(GRIDS), help="per frame")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="denoising passes per chunk")
    parser.add_argument("--chunks", type=int, default=13, help="steady chunks; the first warms up")
    parser.add_argument("--only", default="", help="policies whose name holds this")
    parser.add_argument("--buffers", default="remake", choices=("remake", "keep"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    geometry = Geometry(
        given.layers, given.heads, given.width, GRIDS[given.tokens], Rotary(given.width), 21
    )
    geometry = replace(geometry, chunk=CHUNK, flight=CHUNK)
    frames = FULL + CHUNK * (2 + given.chunks)
    rows: dict[str, Any] = {}
    for name, (mine, other) in rivals(given.layers, given.heads).items():
        if given.only not in name:
            continue
        with torch.no_grad():
            pair = [
                PlainCache(geometry, frames)
                if spec == HARD
                else CacheSession(geometry, load_policy(spec), buffers=given.buffers)
                for spec in (mine, other)
            ]
            found = ratios(*pair, geometry, given)
        low, high = interval(found)
        rows[name] = {"over": str(other), "ratio": median(found), "low": low, "high": high}
        sys.stdout.write(f"{name:34} {median(found):.3f} [{low:.3f}, {high:.3f}] of {other}\n")
        sys.stdout.flush()
    if given.json:
        about = {"torch": torch.__version__, **{k: str(v) for k, v in vars(given).items()}}
        given.json.write_text(json.dumps({"settings": about, "ratios": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
