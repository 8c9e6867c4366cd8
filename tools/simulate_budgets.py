"""What head budgets can gain, and how much noise takes away: drawn heads, whose truth is known.

    python tools/simulate_budgets.py
    python tools/simulate_budgets.py --draws 100 --sigma 0.5 --json budgets.json

How to read it. Heads lose ``A exp(-k b)`` with b frames beyond the least: ``ln A`` is normal with a
standard deviation sigma, ``ln k`` with 0.4 sigma.

* `rules`: what each rule loses over the optimum when it knows the truth. `AM/GM` is what uniform
  would lose if all k were the same.
* `noise`: budgets solved on curves of 16 prompts, whose mean has the standard error that is said,
  judged on the truth. `kept` is the share of the gain over uniform that is left (below 0 they are
  worse than uniform), with shrinkage and without; `promised` is the loss that the noisy curves
  predict over the true one: below 1 they flatter themselves. Half of the noise (in logs) is the
  same at all budgets of a head and prompt.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_kv.policies.allocation import Heads, allocate
from lightning_kv.policies.curve_statistics import am_gm, loss_of, shrunken, summed_up

LAYERS, HEADS, LOW, ROOM, PROMPTS = 30, 12, 4, 14, 16
SHOWN = ("uniform", "pyramid", "focused-matched", "proportional", "log", "levels", "greedy")
ERRORS = (0.1, 0.2, 0.4, 0.8)


def heads(sigma: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """True curves ``[L, H, K]`` and importances ``[L, H]``."""
    own = [torch.randn(LAYERS, HEADS, generator=generator, dtype=torch.float64) for _ in "Ak"]
    size, rate = (sigma * own[0]).exp(), 0.6 * (0.4 * sigma * own[1]).exp()
    step = torch.arange(ROOM + 1, dtype=torch.float64)
    return size.unsqueeze(-1) * (-rate.unsqueeze(-1) * step).exp(), size


def seen(curves: Tensor, error: float, generator: torch.Generator) -> Tensor:
    """Curves of prompts ``[P, L, H, K]``: noise whose mean over prompts has this relative error."""
    spread = math.sqrt(math.log1p(PROMPTS * error**2) / 2)
    out = curves.expand(PROMPTS, *curves.shape)
    for shape in (out.shape, (*out.shape[:3], 1)):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        out = out * (spread * noise - spread**2 / 2).exp()
    return out


def rules(sigma: float, mean: float, draws: int, seed: int) -> dict[str, float]:
    """Loss of each rule over the optimum, mean over draws, and AM/GM."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for _ in range(draws):
        curves, size = heads(sigma, generator)
        of = Heads(LAYERS, HEADS, LOW, LOW + ROOM, curves, size)
        best = loss_of(curves, allocate("optimal", mean, of), LOW)
        for rule in (*SHOWN, "shuffled"):
            own = loss_of(curves, allocate(rule, mean, of), LOW) / best
            found[rule] = found.get(rule, 0.0) + own / draws
        found["AM/GM"] = found.get("AM/GM", 0.0) + am_gm(size) / draws
    return found


def noise(sigma: float, mean: float, draws: int, seed: int) -> dict[float, dict[str, float]]:
    """What is kept of the gain, by the relative standard error of the curves."""
    generator = torch.Generator().manual_seed(seed)
    found = {error: dict.fromkeys(("kept, shrunk", "kept", "promised"), 0.0) for error in ERRORS}
    for error, row in found.items():
        for _ in range(draws):
            curves, _ = heads(sigma, generator)

            def solved(known: Tensor) -> Tensor:
                return allocate("optimal", mean, Heads(LAYERS, HEADS, LOW, LOW + ROOM, known))

            def true(budgets: Tensor, curves: Tensor = curves) -> float:
                return loss_of(curves, budgets, LOW)

            even, best = (
                true(allocate(rule, mean, Heads(LAYERS, HEADS, LOW, LOW + ROOM, curves)))
                for rule in ("uniform", "optimal")
            )
            plain, errors = summed_up(seen(curves, error, generator))
            own = {"kept": solved(plain), "kept, shrunk": solved(shrunken(plain, errors))}
            for name, budgets in own.items():
                row[name] += (even - true(budgets)) / (even - best) / draws
            row["promised"] += loss_of(plain, own["kept"], LOW) / true(own["kept"]) / draws
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Draw, and show both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sigma", type=float, default=1.0, help="spread of ln A (1.0)")
    parser.add_argument("--mean", type=float, default=LOW + 2.0, help="frames per head (6)")
    parser.add_argument("--draws", type=int, default=20, help="of all heads (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    asked = parser.parse_args(words)
    if asked.draws < 1 or asked.sigma <= 0 or not LOW < asked.mean < LOW + ROOM:
        parser.error(
            f"Nothing to draw: --draws {asked.draws}, --sigma {asked.sigma:g}, --mean "
            f"{asked.mean:g}. Give draws from 1, a spread above 0 and a mean between {LOW} and "
            f"{LOW + ROOM}."
        )
    settings = (asked.sigma, asked.mean, asked.draws, asked.seed)
    found = {"rules": rules(*settings), "noise": noise(*settings)}
    out = Console(width=100)
    table = Table("rule", "loss / optimum", title="rules that know the truth")
    for rule, value in found["rules"].items():
        table.add_row(rule, f"{value:.4f}")
    out.print(table)
    table = Table("error", *next(iter(found["noise"].values())), title="noise")
    for error, row in found["noise"].items():
        table.add_row(f"{error:.0%}", *(f"{value:.2f}" for value in row.values()))
    out.print(table)
    if asked.json:
        asked.json.write_text(json.dumps({**vars(asked), **found}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
