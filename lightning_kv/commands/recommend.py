"""`lightning-kv recommend`: which policy to run, from a run's results."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, say


@dataclass(frozen=True)
class RecommendOptions:
    """Which policy to run, from what an evaluation has measured.

    Args:
        run: Run directory that evaluate made.
        memory: Most that the cache of one clip may take, such as 24GiB (no limit).
        margin: Largest loss that is allowed, such as recall=0.02 (see below).
        json: For programs.
    """

    run: Path
    memory: str | None = None
    margin: str | None = None
    json: bool = False


def run(options: RecommendOptions) -> None:
    """Say which, and why."""
    from lightning_kv.policies.budgets import read_memory
    from lightning_kv.runs.margins import read_margins
    from lightning_kv.runs.recommend import recommend
    from lightning_kv.tasks.report import open_run, summary_of

    memory, margins = read_memory(options.memory), read_margins(options.margin)
    opened = open_run(options.run)
    found = recommend(summary_of(opened, intervals=False), opened.records(), memory, margins)
    if options.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n")
        return
    say(console(), found.words)


COMMAND = Command(
    "recommend",
    RecommendOptions,
    run,
    """\
A policy qualifies where it fits into the memory, no clip failed under it, it saves memory or reads,
and its mean loss against the reference, prompt by prompt, is within every margin with 95 %
confidence: by the BCa bootstrap over prompts, never more than 1 - 0.5^n for n prompts (fewer than 5
recommend nothing), and corrected for the number of policies and metrics (Holm). Of those that
qualify, the one with the fewest bytes wins, then the one with the fewest reads (to 1 % of the
reference).

A margin is how much worse than the reference a metric may be, in its own unit. ssim and latent_mse
are losses from 1 and 0, what two equal clips have; psnr has no such value and takes no margin.
Without --margin it is the first of recall=0.02, revisit_error=0.002, ssim=0.02 that the run has.

examples:
  lightning-kv recommend runs/quickstart
  lightning-kv recommend runs/quickstart --memory 2MiB --margin recall=0.05,ssim=0.1
  lightning-kv recommend runs/quickstart --json""",
    positional={"run": "RUN"},
    metavars={"memory": "BYTES", "margin": "METRIC=LOSS,..."},
)
