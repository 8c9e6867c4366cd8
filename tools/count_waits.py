"""How often does the host wait for the device in one chunk?

    python tools/count_waits.py [--layers 30]

Rolls out a small network of random weights with 12 heads under every preset and some combinations,
and counts, in chunk 8, what would wait on a GPU: in the first pass (which makes the plan), in the
later denoising passes, and in the commit pass with its decisions. Waits of the sampler itself, such
as for noise, are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_kv import load_policy, rollout
from lightning_kv.models.samplers import sampler_of, spaced
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import preset, presets, sized
from lightning_kv.tasks.benchmark.waits import counting
from lightning_kv.testing.candidate import headed
from lightning_kv.testing.tapes import camera

CHUNK, HEADS = 8, 12
LEVELS = (1000.0, 750.0, 500.0, 250.0)
SAMPLERS: dict[str, dict[str, Any]] = {
    "few-step": {"timesteps": LEVELS},
    "rolling": {"timesteps": LEVELS, "sampler": "rolling"},
    "guided": {"timesteps": spaced(4, 5.0), "sampler": "flow", "guidance": 3.0},
}


@dataclass(frozen=True)
class Case:
    """What is rolled out.

    Args:
        name: Of the row.
        policy: For `load_policy`.
        sampler: One of `SAMPLERS`.
        batch: Samples.
        planned: Waits that a plan may take, over all layers and samples.
        each: A plan is made in every pass.
        codes: Rows get codecs.
        opening: Waits of retentions in the first pass, before its attention, over all layers.
        closing: The same in the commit pass.
        record: Tables that are made on the way.
    """

    name: str
    policy: Any
    sampler: str = "few-step"
    batch: int = 1
    planned: int = 0
    each: bool = False
    codes: bool = False
    opening: int = 0
    closing: int = 0
    record: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Waits in one chunk, by kind of pass."""

    name: str
    first: int
    denoise: int
    commit: int
    denoising: int
    replanned: bool


def cases(layers: int) -> list[Case]:
    """All that is counted."""
    shares = [[0.5, 1.5, 1.0, 0.75] * (HEADS // 4)] * layers
    table = {"part": "table", "amount": "9f", "shares": shares}
    ragged = {"part": "window", "sink": 1, "budget": table}
    tokens = {"part": "heavy-hitters", "granularity": "token", "budget": "6f"}
    once = {"part": "focused", "budget": "6f", "per_query_frame": False, "refresh": "chunk"}
    mass = {"part": "focused", "score": "mass", "refresh": "chunk"}
    adaptive = mass | {"budget": {"part": "adaptive", "amount": "4f"}}
    coded = {"part": "aged", "codec": "int4", "age": 3}
    found = []
    for name in presets(any_model=True):
        fixed = name in ("infinity-rope", "rolling-forcing")
        spec = name if fixed else sized(name, "12f" if name == "future-focused" else "6f")
        for sampler in SAMPLERS:
            if sampler != "rolling" and name == "rolling-forcing":
                continue
            own, all_layers = preset(name), layers * (1 + (sampler == "guided"))
            counts = own.select.waits
            found.append(
                Case(
                    spec if sampler == "few-step" else f"{spec}, {sampler}",
                    spec,
                    sampler,
                    planned=all_layers * counts,
                    each=counts and sampler == "rolling",  # the commit pass has other frames
                    codes=own.precision.codes,
                    opening=all_layers * ("open" in own.retain.moments),
                    closing=all_layers * ("closing" in own.retain.moments),
                )
            )
    return [
        *found,
        Case("full, written down", "full", record=("mass", "outputs")),
        Case("full, written down, rolling", "full", "rolling", record=("mass", "outputs")),
        Case("a ragged window, written down", {"name": "r", "retain": ragged}, record=("mass",)),
        Case("focused once per chunk and head", {"name": "once", "select": once}),
        Case("table-budget window", {"name": "table", "retain": ragged}),
        Case("h2o over tokens", {"name": "tokens", "retain": tokens}),
        Case(
            "h2o over tokens, shared branches",
            {"name": "shared", "retain": tokens, "branches": "shared"},
            "guided",
        ),
        Case("int4 window", {"name": "int4", "retain": ragged, "precision": coded}, codes=True),
        Case(
            "focused x adaptive x ragged window",
            {"name": "free", "retain": ragged, "select": adaptive},
            batch=2,
            planned=2 * layers,
        ),
        Case(
            "the same, refresh: pass",
            {"name": "free", "retain": ragged, "select": adaptive | {"refresh": "pass"}},
            batch=2,
            planned=2 * layers,
            each=True,
        ),
    ]


def rows(layers: int) -> Iterator[Row]:
    """Roll out and count."""
    torch.set_num_threads(1)
    yield from (counted(case, layers) for case in cases(layers))


def counted(case: Case, layers: int, chunk: int = CHUNK) -> Row:
    """Waits of one case in a chunk; the rollout ends with the next."""
    config = WanConfig(
        dim=12 * HEADS, ffn_dim=96, layers=layers, heads=HEADS, text_dim=16, latent_size=(4, 4)
    )
    model = random_model(replace(config, **SAMPLERS[case.sampler]))
    frames = 3 * (chunk + 2)
    prompts = [f"prompt {i}" for i in range(case.batch)]
    policy, about = headed(load_policy(case.policy), model.network.geometry()), {"decode": False}
    if policy.needs:
        told = rollout(model, preset("full"), prompts, frames, record=policy.needs, **about)
        about["tables"] = told.tables
    if policy.inputs:
        about["inputs"] = {"pose": [camera(i, frames) for i in range(case.batch)]}
    about["record"] = case.record
    with counting("cpu") as waits:
        watched = waits.watched(sampler_of(model.network.config))
        rollout(model, policy, prompts, frames, sampler=watched, **about)
    own, passes = waits.summary(chunk)["by_pass"], waits.summary(chunk)["passes"]
    counts = (own["first"], own["denoise"], own["commit"])
    return Row(case.name, *counts, passes["denoise"], case.each)


def random_model(config: WanConfig) -> VideoModel:
    """A network of random weights and a random text."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = CausalWan(config).eval().requires_grad_(False)
        text = torch.randn(1, 4, config.text_dim)
    return VideoModel(network, None, lambda prompts: text.expand(len(prompts), -1, -1))


def main() -> int:
    """Count and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    layers = parser.parse_args().layers
    table = Table("policy", "first pass", "later passes", "commit", box=None)
    for row in rows(layers):
        table.add_row(row.name, *map(str, (row.first, row.denoise, row.commit)))
        sys.stderr.write(f"{row.name}\n")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
