"""Are the statistics right? Simulated data, whose truth is known, against what they claim.

    python tools/simulate_statistics.py
    python tools/simulate_statistics.py --simulations 10000 --seed 1 --json statistics.json

How to read it. Every row draws new prompts from a known distribution again and again, asks the
functions that reports and recommendations use, and counts, in percent of the data sets:

* `interval`: how often the 95 % interval holds the true mean. 95 would be perfect.
* `sign flip`: how often two equal policies are called different at 5 %.
* `not worse`: how often a policy whose true loss lies exactly at the margin is called not worse at
  95 %. This is the error that would recommend a bad policy: 5 would be perfect.
* `Holm`: how often at least one true null hypothesis is rejected at 5 %, among 24 correlated tests
  (6 policies with 4 metrics each); `alone` is the same without Holm, for comparison.
* `power`: how often a policy is called not worse, on as many prompts as `prompts_needed` asks for,
  or where the margin is as far above the mean as `detectable` says. 80 is what is asked for.

`allowed` is where the percentage must lie, but for twice its Monte-Carlo error; rows without it
show the limits of the method. Exponential losses have a long tail of bad prompts. With `rare
failures`, one prompt in five loses and the others lose nothing: as long as few or none of these
are among the prompts, no test can know of them. Exits 1 where a percentage is not as allowed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.inference import (
    detectable,
    holm,
    non_inferiority,
    prompts_needed,
    sign_flip_p,
)

Generator = np.random.Generator
Draw = Callable[[Generator, int], np.ndarray]
Range = tuple[float, float]

DRAWS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "t, 5 degrees": lambda rng, n: rng.standard_t(5, n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "rare failures": lambda rng, n: (rng.random(n) < 0.2) * rng.uniform(0, 1, n) - 0.1,
}
"""All have a mean of 0."""

COVERAGE: dict[str, Range] = {
    "normal": (93, 97),
    "uniform": (93, 97),
    "t, 5 degrees": (92, 97),
    "exponential": (91, 97),
}
FALSE_ALARM: Range = (3.5, 6.5)
SYMMETRIC = ("normal", "uniform", "t, 5 degrees")
RESAMPLES = 2000  # for the tests too, to save time
FAMILY = (6, 4)  # policies, metrics


@dataclass(frozen=True)
class Figure:
    """One row: a percentage, and where it must lie.

    Args:
        what: What is counted.
        case: Which data.
        n: Number of prompts.
        percent: Share of the simulated data sets.
        error: Standard error of that by chance, in percent.
        allowed: Where it must lie; None where nothing is claimed.
    """

    what: str
    case: str
    n: int
    percent: float
    error: float
    allowed: Range | None

    @property
    def broken(self) -> bool:
        """Whether it lies outside of what is allowed by more than twice its error."""
        if self.allowed is None:
            return False
        low, high = self.allowed
        return not low - 2 * self.error <= self.percent <= high + 2 * self.error


def figure(what: str, case: str, n: int, hits: list[bool], allowed: Range | None) -> Figure:
    """The row of what was counted."""
    share = float(np.mean(hits))
    # One more of each kind: no hit at all still leaves an error.
    near = (sum(hits) + 1) / (len(hits) + 2)
    error = 100 * math.sqrt(near * (1 - near) / len(hits))
    return Figure(what, case, n, 100 * share, error, allowed)


def intervals(rng: Generator, simulations: int, sizes: tuple[int, ...]) -> Iterator[Figure]:
    """How often the interval of 95 % holds the mean."""
    for case, draw in DRAWS.items():
        for n in sizes:
            found = [bca_interval(draw(rng, n), resamples=RESAMPLES) for _ in range(simulations)]
            hits = [low <= 0 <= high for low, high in found]
            yield figure("interval", case, n, hits, COVERAGE.get(case))


def false_differences(rng: Generator, simulations: int, sizes: tuple[int, ...]) -> Iterator[Figure]:
    """How often two policies with values of one distribution are called different."""
    for case, draw in DRAWS.items():
        if case == "rare failures":
            continue  # most differences are 0, and so few signs leave no p value near 5 %
        for n in sizes:
            pairs = ((draw(rng, n), draw(rng, n)) for _ in range(simulations))
            hits = [sign_flip_p(a - b) <= 0.05 for a, b in pairs]
            yield figure("sign flip", case, n, hits, FALSE_ALARM)


def false_recommendations(
    rng: Generator, simulations: int, sizes: tuple[int, ...]
) -> Iterator[Figure]:
    """How often a loss at the margin is called within it."""
    for case, draw in DRAWS.items():
        for n in sizes:
            hits = [not_worse(draw(rng, n), 0.0) for _ in range(simulations)]
            allowed = FALSE_ALARM if case in SYMMETRIC else None
            yield figure("not worse", case, n, hits, allowed)


def families(rng: Generator, simulations: int, n: int = 12) -> Iterator[Figure]:
    """How often a family of tests has a false positive, where all and where some nulls hold."""
    for case, real in (("all nulls hold", 0), ("8 of 24 false", 8)):
        effect = np.zeros(math.prod(FAMILY))
        effect[:real] = 1.2
        alone, adjusted, found = [], [], []
        for _ in range(simulations):
            p_values = [sign_flip_p(column) for column in (correlated(rng, n) + effect).T]
            alone.append(min(p_values[real:]) <= 0.05)
            decided = holm(p_values)
            adjusted.append(min(decided[real:]) <= 0.05)
            found += [p <= 0.05 for p in decided[:real]]
        yield figure("alone", case, n, alone, None)
        yield figure("Holm", case, n, adjusted, (0, 5))
        if found:
            yield figure("Holm", "false ones found", n, found, None)


def correlated(rng: Generator, n: int) -> np.ndarray:
    """Differences of all policies and metrics, normal with variance 1: [n, policies * metrics].

    Policies share the reference's luck on a prompt, metrics see the same clip.
    """
    policies, metrics = FAMILY
    shared = rng.normal(size=(n, 1, metrics)) + rng.normal(size=(n, policies, 1))
    own = rng.normal(size=(n, policies, metrics))
    return ((shared + own) / math.sqrt(3)).reshape(n, -1)


def powers(rng: Generator, simulations: int) -> Iterator[Figure]:
    """How often the test succeeds that was planned to succeed in 80 %."""
    pilot = np.array([-1.0, 1.0] * 8) * math.sqrt(15 / 16)  # mean 0, deviation 1
    plans = [(prompts_needed(pilot, margin), margin, "needed") for margin in (1, 0.6, 0.4)]
    plans.append((len(pilot), detectable(pilot), "detectable"))
    for n, margin, case in plans:
        hits = [not_worse(rng.normal(size=n), margin) for _ in range(simulations)]
        yield figure("power", f"{case} at {margin:.2f}", n, hits, (77, 87))


def not_worse(losses: np.ndarray, margin: float) -> bool:
    """The verdict, as a word of its own."""
    return non_inferiority(losses, margin, resamples=RESAMPLES).verdict == "not worse"


def simulate(simulations: int, seed: int, sizes: tuple[int, ...]) -> list[Figure]:
    """All rows."""
    rng = np.random.default_rng(seed).spawn(5)
    return [
        *intervals(rng[0], simulations, sizes),
        *false_differences(rng[1], simulations, sizes),
        *false_recommendations(rng[2], simulations, sizes),
        *families(rng[3], simulations),
        *powers(rng[4], simulations),
    ]


def table(figures: list[Figure], simulations: int) -> Table:
    """The rows, for a terminal."""
    made = Table(title=f"{simulations} simulated data sets per row")
    for name in ("what", "data", "prompts", "percent", "± error", "allowed", ""):
        made.add_column(name, justify="left" if name in ("what", "data", "") else "right")
    for row in figures:
        allowed = "" if row.allowed is None else "{:g} to {:g}".format(*row.allowed)
        sign = "[red]broken[/]" if row.broken else "ok" if row.allowed else ""
        numbers = (str(row.n), f"{row.percent:.1f}", f"{row.error:.1f}")
        made.add_row(row.what, row.case, *numbers, allowed, sign)
    return made


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--simulations", type=int, metavar="N", help="data sets per row (2000)")
    made.add_argument("--seed", type=int, default=0, help="of the data (0)")
    made.add_argument("--quick", action="store_true", help="200 data sets, and fewer sizes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Simulate, show, and say by the exit code whether all is as allowed."""
    made = parser()
    options = made.parse_args(arguments)
    simulations, sizes = (200, (8, 32)) if options.quick else (2000, (8, 16, 32, 64))
    if options.simulations is not None:
        simulations = options.simulations
    if simulations < 1:
        made.error(f"--simulations {simulations} counts nothing. Give 1 or more, such as 2000.")
    figures = simulate(simulations, options.seed, sizes)
    Console().print(table(figures, simulations))
    if options.json:
        rows = [asdict(row) | {"broken": row.broken} for row in figures]
        found = {"simulations": simulations, "seed": options.seed, "figures": rows}
        options.json.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    return int(any(row.broken for row in figures))


if __name__ == "__main__":
    raise SystemExit(main())
