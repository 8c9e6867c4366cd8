"""`lightning-kv check`: is a run worse than an earlier one."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, say


@dataclass(frozen=True)
class CheckOptions:
    """Is a run worse than an earlier one by more than you allow?

    Args:
        run: Run directory, or its summary.json.
        baseline: Another run, or its summary.json.
        margin: Largest loss that is allowed, such as recall=0.02 (as for recommend).
        policies: Which (all that both have).
        level: Confidence of the verdict.
        json: For programs.
    """

    run: Path
    baseline: Path
    margin: str | None = None
    policies: list[str] | None = None
    level: float = 0.95
    json: bool = False


def run(options: CheckOptions) -> int:
    """Say it; exit code 0 passed, 1 worse, 2 too few prompts."""
    from lightning_kv.runs.check import check
    from lightning_kv.runs.margins import read_margins

    margins = read_margins(options.margin)
    found = check(options.run, options.baseline, margins, options.policies, options.level)
    if options.json:
        said = {"code": found.code, "words": found.words, **dataclasses.asdict(found)}
        sys.stdout.write(json.dumps(said, indent=1, allow_nan=False) + "\n")
    else:
        say(console(), found.words)
    return found.code


COMMAND = Command(
    "check",
    CheckOptions,
    run,
    """\
Paired by prompt. Exit code 0: not worse by more than the margin, with the confidence of --level;
1: worse by more than that; 2: too few prompts to say (it says how many more would do), or an error.

examples:
  lightning-kv check runs/now --baseline baseline/summary.json --margin psnr=0.5,recall=0.02
  lightning-kv check runs/now --baseline runs/before --policies [top-attention@9f]""",
    positional={"run": "RUN"},
    metavars={"margin": "METRIC=LOSS,..."},
)
