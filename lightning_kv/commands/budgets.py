"""`lightning-kv budgets`: how many frames each head gets, from a file of head curves."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, say

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_kv.tasks.budgets import BudgetMap


@dataclass(frozen=True)
class BudgetOptions:
    """How many frames each head gets, and what that is predicted to gain over uniform budgets.

    Args:
        heads: File of head curves that calibrate made, or auto, the shipped one.
        mean: History frames per head on average, such as 5f; of focused the most.
        rule: Of the division, see below.
        scorer: What kept frames: mass (what is read), recency, or a part.
        metric: How loss was measured, of mass, output, gn and exact.
        objective: Over prompts, mean or cvar (the worst quarter).
        importance: What rules by importance look at; curve is the loss at the smallest budget.
        shrink: Take the noise out of the curves first.
        least: Frames that every head gets (what the scorer's part protects).
        most: Frames that no head exceeds (the largest that was measured).
        gamma: Of the focused rules.
        beta: Of the pyramids.
        levels: Of levels, most different budgets.
        seed: Of shuffled.
        resamples: Of the prompts, to judge budgets on those that they were not solved on.
        json: For programs; layers and heads from 0.
        out: HTML file with the map (none is written).
        force: Replace the file of --out.
    """

    heads: Path
    mean: str
    rule: str = "optimal"
    scorer: str = "mass"
    metric: str = "gn"
    objective: str = "mean"
    importance: str = "curve"
    shrink: bool = True
    least: str | None = None
    most: str | None = None
    gamma: float = 2.0
    beta: float = 20.0
    levels: int = 3
    seed: int = 0
    resamples: int = 200
    json: bool = False
    out: Path | None = None
    force: bool = False


def run(options: BudgetOptions) -> None:
    """Solve them, and show the map.

    Raises:
        ValueError: No such file or curves, a mean that cannot be divided, or the page is there.
    """
    from lightning_kv.policies.allocation import Knobs
    from lightning_kv.policies.curve_tables import Reading, file_of_curves
    from lightning_kv.policies.head_curves import HeadCurves
    from lightning_kv.tasks.budgets import budget_map, read_frames, sentences

    _check(options)
    limits = [getattr(options, name) for name in ("least", "most")]
    least, most = (
        None if text is None else int(read_frames(text, name, whole=True))
        for name, text in zip(("least", "most"), limits, strict=True)
    )
    mean = read_frames(options.mean, "mean")
    chosen = (options.scorer, options.metric, options.objective, options.shrink)
    knobs = Knobs(options.gamma, options.beta, options.levels, options.seed)
    curves = HeadCurves.load(file_of_curves(options.heads))
    how = Reading(*chosen, options.importance)
    found = budget_map(curves, options.rule, mean, how, least, most, knobs, options.resamples)
    told = sentences(found, model := curves.about.get("model", {}).get("name", ""))
    if others := [own for own in curves.scorers if own != options.scorer]:
        told.append(f"It also has curves of {', '.join(others)} (--scorer), each for its own part.")
    if options.out:
        _write(options, model, told, found)
    if options.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n")
        return
    out = console()
    out.print(_table(found))
    out.print()
    say(out, told)
    if options.out:
        out.print(f"The page is {options.out}", soft_wrap=True)


def _check(options: BudgetOptions) -> None:
    """Refuse what would be noticed after seconds of work."""
    if options.resamples < 20:
        raise ValueError(
            f"--resamples {options.resamples} are too few for a 95th percentile. Give 20 or more, "
            "such as 200."
        )
    if options.out is None:
        return
    if options.out.suffix not in (".html", ".htm") or not options.out.parent.is_dir():
        raise ValueError(
            f"-o/--out {options.out} is no place for a page. It needs a name that ends in .html, "
            "in a folder that is there, such as budgets.html."
        )
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} is there already. Give another --out, or --force.")


def _write(options: BudgetOptions, model: str, told: list[str], found: BudgetMap) -> None:
    """The page."""
    from lightning_kv.report.budget_page import write_budget_page

    words = ["lightning-kv", "budgets", str(options.heads)]
    for each in dataclasses.fields(options)[1:]:
        value = getattr(options, each.name)
        if value != each.default and each.name not in ("json", "force"):
            words += [f"--{each.name}", str(value).lower() if value is False else str(value)]
    title = f"{found.rule} budgets of {found.mean:g} frames" + (f", {model}" if model else "")
    write_budget_page(options.out, title, told, found.budgets, shlex.join(words))


def _table(found: BudgetMap) -> Table:
    """Layers from top to bottom, heads from left to right; stronger where there are more frames."""
    from rich.table import Table
    from rich.text import Text

    from lightning_kv.report.budget_page import shade
    from lightning_kv.tasks.budgets import rows

    low, high = (f(map(f, found.budgets)) for f in (min, max))
    table = Table(box=None, padding=(0, 0), pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("frames of heads 1, 2, ...", no_wrap=True)
    table.add_column("mean", justify="right")
    width = len(str(high)) + 1
    for layer, own, mean in rows(found):
        cells = Text(" ")
        for frames in own:
            fill, ink = shade(frames, low, high)
            cells.append(f"{frames:>{width}} ", f"{ink} on {fill}")
        table.add_row(f"{layer} ", cells, f" {mean:.2f}")
    return table


COMMAND = Command(
    "budgets",
    BudgetOptions,
    run,
    """\
Rules: uniform, pyramid, pyramid-reversed; by importance focused, focused-matched, published (a
control), proportional, log; by curves optimal (exact), greedy, levels (few different budgets),
shuffled (a control). All but focused give the mean exactly. Losses of heads are added up; out of
bag, budgets are solved on resampled prompts and judged on the others. A policy solves the same
from the same file:
  budget: {part: calibrated, amount: 5f, heads: heads.safetensors, rule: optimal}

examples:
  lightning-kv budgets heads.safetensors --rule optimal --mean 5f
  lightning-kv budgets heads.safetensors --mean 6 --scorer heavy-hitters -o budgets.html
  lightning-kv budgets heads.safetensors --mean 5.5f --rule levels --levels 2 --least 4f --json""",
    positional={"heads": "HEADS"},
    metavars={"mean": "FRAMES", "least": "FRAMES", "most": "FRAMES", "out": "FILE"},
)
