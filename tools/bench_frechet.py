"""How fast is the Frechet distance, and do all ways to compute it agree?

    OMP_NUM_THREADS=1 python tools/bench_frechet.py
    python tools/bench_frechet.py --clips 128 2048 --features 400 --json bench.json

Every route gets the same float32 features and gives one number, on the CPU; "given covariances" is
the part of torchmetrics' route that is left when its covariances are there already. Routes take
turns of 50 ms or more, medians over the turns are shown, and the ratio is to torchmetrics' whole
route (its FID, without the network). CPU time is the one to read on one thread of a busy machine.
Exits 1 where a route is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import scipy
import torch
import torchmetrics
from rich.console import Console
from rich.table import Table
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from lightning_kv.metrics.functional.frechet import frechet_distance, frechet_from_moments
from lightning_kv.metrics.functional.moments import Moments

WHOLE = "torchmetrics"
TOLERANCE = 1e-4


def draw(clips: int, features: int, seed: int) -> Tensor:
    """Features whose variances fall as 1/k, float32 ``[clips, features]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, features, generator=generator) / torch.arange(1, features + 1).sqrt()


def summed(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance as torchmetrics' FID has them, from its float64 sums."""
    x, n = features.double(), len(features)
    total, outer = x.sum(dim=0), x.t().mm(x)
    mean = (total / n).unsqueeze(0)
    return mean.squeeze(0), (outer - n * mean.t().mm(mean)) / (n - 1)


def by_sqrtm(x: Tensor, y: Tensor) -> float:
    """The distance as most implementations have it."""
    (m1, c1), (m2, c2) = (
        (z.mean(0), np.cov(z, rowvar=False)) for z in (x.double().numpy(), y.double().numpy())
    )
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.trace(sqrtm(c1 @ c2)).real)


def routes(x: Tensor, y: Tensor) -> dict[str, Callable[[], float]]:
    """Every way from features to a distance."""
    given = (*summed(x), *summed(y))
    return {
        WHOLE: lambda: _compute_fid(*summed(x), *summed(y)).item(),
        "torchmetrics, given covariances": lambda: _compute_fid(*given).item(),
        "scipy sqrtm": lambda: by_sqrtm(x, y),
        "frechet_from_moments": lambda: frechet_from_moments(Moments.of(x), Moments.of(y)).item(),
        "frechet_distance": lambda: frechet_distance(x, y).item(),
    }


def measure(clips: int, features: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds and CPU seconds, their ratios and the value of every route."""
    ways = routes(draw(clips, features, seed=0), draw(clips, features, seed=1))
    found = {name: {"value": way()} for name, way in ways.items()}
    turns = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            turns[name].append(turn(way))
    for name, times in turns.items():
        found[name]["seconds"], found[name]["cpu_seconds"] = map(median, zip(*times, strict=True))
    for kind in ("seconds", "cpu_seconds"):
        whole = found[WHOLE][kind]
        for each in found.values():
            each[f"ratio_{kind}"] = whole / each[kind]
    return found


def turn(way: Callable[[], float]) -> tuple[float, float]:
    """Seconds and CPU seconds of one call, a mean over as many as take 50 ms."""
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - start) < 0.05:
        way()
        calls += 1
    return seconds / calls, (time.process_time() - cpu) / calls


def main() -> int:
    """Measure, show, and say whether the routes agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--features", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7, help="turns of which medians are taken")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()
    found = {n: measure(n, options.features, options.repeats) for n in options.clips}
    threads = torch.get_num_threads()
    table = Table("route", title=f"two sets of N x {options.features} features, {threads} threads")
    for n in found:
        table.add_column(f"{n} clips", justify="right")
        for title in ("faster", "CPU time", "less", "distance"):
            table.add_column(title, justify="right")
    for name in next(iter(found.values())):
        table.add_row(name, *(text for each in found.values() for text in cells(each[name])))
    Console(width=140).print(table)
    if options.json:
        versions = {each.__name__: each.__version__ for each in (torch, torchmetrics, scipy, np)}
        about = {"threads": threads, "features": options.features, "versions": versions}
        options.json.write_text(json.dumps(about | {"clips": found}, indent=2) + "\n")
    return int(any(_apart(each) for each in found.values()))


def cells(each: dict[str, float]) -> list[str]:
    """A route's part of a row."""
    times = [
        text
        for kind in ("seconds", "cpu_seconds")
        for text in (f"{1000 * each[kind]:.2f} ms", f"{each[f'ratio_{kind}']:.1f} x")
    ]
    return [*times, f"{each['value']:.8g}"]


def _apart(each: dict[str, dict[str, float]]) -> bool:
    expected = each["frechet_distance"]["value"]
    return any(abs(c["value"] - expected) > TOLERANCE * expected for c in each.values())


if __name__ == "__main__":
    sys.exit(main())
