"""Do rollouts still give the numbers they gave before a change?

    python tools/same_numbers.py record before.safetensors    # on the commit before the change
    python tools/same_numbers.py compare before.safetensors   # on the commit after it

Rolls out the embedded model (36 frames) under every preset and under combinations that reach the
other parts, and a small Wan with random weights under a rolling and a guided sampler; all in
float32, on one thread of the CPU. `compare` prints, for each, the largest difference of the
latents, and of what it cost; it exits with 1 where latents differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_kv import load_model, load_policy, rollout
from lightning_kv.cache.decisions import Event
from lightning_kv.models.samplers import spaced
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import presets, sized
from lightning_kv.rollout import Rollout
from lightning_kv.testing.candidate import headed

FRAMES = 36
SHARES = {"part": "table", "amount": "6f", "shares": [[0.5, 1.5, 1.0, 0.75]] * 6}
WINDOW = {"part": "window", "sink": 1, "budget": "6f"}
MIXED: dict[str, dict[str, Any]] = {
    "focused-mass": {"select": {"part": "focused", "score": "mass", "budget": "6f"}},
    "focused-lse": {"select": {"part": "focused", "score": "lse", "budget": "6f"}},
    "focused-chunk": {
        "select": {
            "part": "focused",
            "budget": "6f",
            "per_query_frame": False,
            "refresh": "chunk",
        }
    },
    "h2o-tokens": {"retain": {"part": "heavy-hitters", "granularity": "token", "budget": "6f"}},
    "future-tokens": {
        "retain": {"part": "future", "granularity": "token", "sink": 1, "budget": "6f"}
    },
    "future-weight": {
        "retain": {"part": "future", "merge": "weight", "budget": "6f"},
        "bias": "log_weight",
    },
    "future-hyperplane": {
        "retain": {
            "part": "future",
            "merge": "hyperplane",
            "align": "relative",
            "limit": 0.1,
            "budget": "6f",
        }
    },
    "future-cells": {
        "retain": {"part": "future", "proxy": "cells", "variance": True, "budget": "6f"}
    },
    "ragged-window": {"retain": WINDOW | {"budget": SHARES}},
    "ragged-focused": {
        "retain": WINDOW | {"budget": SHARES},
        "select": {"part": "top-attention", "budget": "3f", "per_query_frame": True},
        "positions": "contiguous",
    },
    "aged-int8": {"precision": {"part": "aged", "codec": "int8", "age": 3}},
    "int4-window": {"retain": WINDOW, "precision": {"part": "aged", "codec": "int4", "age": 3}},
    "int2": {"precision": {"part": "aged", "codec": "quant-video-gen", "age": 6}},
    "sink-lag": {"retain": WINDOW, "positions": {"part": "sink-lag", "sink": 1, "lag": 9}},
    "clamp": {"positions": {"part": "clamp", "lag": 9}},
    "correction": {
        "retain": {"part": "future", "budget": "6f"},
        "positions": {"part": "temporal-correction", "window": 9},
    },
}
SMALL = WanConfig(dim=48, ffn_dim=96, layers=2, heads=2, text_dim=16, latent_size=(4, 6), chunk=3)


def small(**changes: Any) -> VideoModel:
    """A Wan of random weights, always the same."""
    from dataclasses import replace

    config = replace(SMALL, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = CausalWan(config).eval().requires_grad_(False)
        text = torch.randn(1, 4, config.text_dim)
    return VideoModel(network, None, lambda prompts: text.expand(len(prompts), -1, -1))


def spec_of(name: str, budget: str = "6f") -> Any:
    """What `load_policy` takes."""
    if name in MIXED:
        return {"name": name, **MIXED[name]}
    fixed = ("rolling-forcing", "infinity-rope")
    return name if name in fixed else sized(name, budget)


def rollouts() -> Iterator[tuple[str, Rollout]]:
    """All of them, by name."""
    model, prompts = load_model("panorama"), ["dusk fast n10 left", "mist fast n7 left"]
    switch = [Event("prompt_switch", 18, "noon slow n4 left")]
    for name in [*presets(without_tables=True, any_model=True), *MIXED]:
        if name == "rolling-forcing":
            continue  # wants several chunks in flight
        policy = load_policy(spec_of(name))
        yield f"embedded/{name}", rollout(model, policy, prompts, FRAMES, decode=False)
    for name in ("full", "longlive", "infinity-rope", "focused-forcing", "future-forcing", "h2o"):
        policy = load_policy(spec_of(name))
        made = rollout(model, policy, prompts, FRAMES, events=switch, decode=False)
        yield f"switch/{name}", made
    names = [*presets(without_tables=True, any_model=True), "ragged-rows"]
    levels = (1000.0, 750.0, 500.0, 250.0)
    models = {
        "rolling": small(sampler="rolling", timesteps=levels),
        "guided": small(sampler="flow", timesteps=spaced(4, 5.0), guidance=3.0),
    }
    for kind, model in models.items():
        for name in names:
            if (name == "rolling-forcing") != (kind == "rolling") and name == "rolling-forcing":
                continue
            if name == "ragged-rows":
                part = {"part": "heavy-hitters", "granularity": "token", "budget": "6f"}
                spec: Any = {"name": name, "retain": part, "branches": "shared"}
            else:
                spec = spec_of(name)
            policy = headed(load_policy(spec), model.network.geometry())
            made = rollout(model, policy, ["a", "b"], FRAMES, decode=False)
            yield f"{kind}/{name}", made


def costs(out: Rollout) -> list[list[int]]:
    """Rows read and scored, and bytes, of each sample."""
    return [[c.rows_read, c.rows_scored, c.rows_history, c.peak_bytes] for c in out.costs]


def record(path: Path) -> int:
    """Write all latents and costs."""
    tensors: dict[str, Tensor] = {}
    spent = {}
    for name, out in rollouts():
        tensors[name], spent[name] = out.latents.contiguous(), json.dumps(costs(out))
        sys.stdout.write(f"{name}\n")
    save_file(tensors, path, metadata=spent)
    return 0


def compare(path: Path, tolerance: float) -> int:
    """Roll out again, and say what differs."""
    worst = 0.0
    with safe_open(path, "pt") as file:
        spent = file.metadata()
        for name, out in rollouts():
            if name not in spent:
                sys.stdout.write(f"{name:32} not recorded\n")
                continue
            before = file.get_tensor(name)
            apart = float((out.latents - before).abs().max())
            same = "equal" if torch.equal(out.latents, before) else f"{apart:.1e}"
            old, new = json.loads(spent[name]), costs(out)
            changed = [
                f"{what} {a} -> {b}"
                for what, a, b in zip(
                    ("read", "scored", "history", "peak"), old[0], new[0], strict=True
                )
                if a != b
            ]
            sys.stdout.write(f"{name:32} {same:10} {', '.join(changed) or 'same costs'}\n")
            sys.stdout.flush()
            worst = max(worst, apart)
    sys.stdout.write(f"largest difference {worst:.2e}, tolerance {tolerance:g}\n")
    return int(worst > tolerance)


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="of latents (0)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "record":
        return record(given.file)
    return compare(given.file, given.tolerance)


if __name__ == "__main__":
    raise SystemExit(main())
