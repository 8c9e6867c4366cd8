"""How fast is the Frechet distance, and do all ways to compute it agree?

    OMP_NUM_THREADS=1 python tools/bench_frechet.py
    python tools/bench_frechet.py --clips 128 2048 --features 400 --json bench.json

Every route gets the same float32 features and gives one number, on the CPU; "given covariances" is
the part of torchmetrics' route that is left when its float64 sums are there already. Routes take
turns, medians are shown, and the ratio is to torchmetrics' whole route (its FID, without the
network). Exits 1 where a route is off by more than 1e-4.
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

from lightning_kv.metrics.frechet import frechet_distance, frechet_from_moments
from lightning_kv.metrics.moments import Moments

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
    """Median seconds, ratio and value of every route; one turn before warms up."""
    ways = routes(draw(clips, features, seed=0), draw(clips, features, seed=1))
    values = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    times = {name: median(turns) for name, turns in seconds.items()}
    return {
        name: {"seconds": times[name], "ratio": times[WHOLE] / times[name], "value": values[name]}
        for name in ways
    }


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
        table.add_column("faster", justify="right")
        table.add_column("distance", justify="right")
    for name in next(iter(found.values())):
        cells = [each[name] for each in found.values()]
        row = [(f"{c['seconds']:.4f} s", f"{c['ratio']:.1f} x", f"{c['value']:.8g}") for c in cells]
        table.add_row(name, *(text for texts in row for text in texts))
    Console(width=120).print(table)
    if options.json:
        versions = {each.__name__: each.__version__ for each in (torch, torchmetrics, scipy, np)}
        about = {"threads": threads, "features": options.features, "versions": versions}
        options.json.write_text(json.dumps(about | {"clips": found}, indent=2) + "\n")
    return int(any(_apart(each) for each in found.values()))


def _apart(each: dict[str, dict[str, float]]) -> bool:
    expected = each["frechet_distance"]["value"]
    return any(abs(c["value"] - expected) > TOLERANCE * expected for c in each.values())


if __name__ == "__main__":
    sys.exit(main())
