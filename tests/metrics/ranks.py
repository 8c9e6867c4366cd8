"""Metrics in two processes with uneven work; run as ``python ranks.py FOLDER``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_kv.metrics.fidelity import PSNR
from lightning_kv.metrics.panorama import Recall, Scene
from lightning_kv.metrics.sets import FrechetVideoDistance, JEDi, VideoKernelDistance

METRICS = {
    "fvd": (FrechetVideoDistance, {}),
    "fvd-moments": (FrechetVideoDistance, {"keep_features": False}),
    "jedi": (JEDi, {}),
    "jedi-moments": (JEDi, {"keep_features": False}),
    "jedi-u": (JEDi, {"form": "jedi-u"}),
    "kvd": (VideoKernelDistance, {}),
}
SHARES = {"uneven": (slice(0, 14), slice(14, 20)), "empty": (slice(0, 20), slice(0, 0))}


def features():
    """Generated and real features: whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-8, 9, (2, 20, 6), generator=generator).float()


def fill(metric, rows, batch=4, named=True):
    """Show these rows of both sets, some rows in a last odd batch; with ids, or without."""
    for real, side in enumerate(features()):
        ids = torch.arange(20) * 3 + 1
        for part, names in zip(side[rows].split(batch), ids[rows].split(batch), strict=True):
            if len(part):
                labels = {"ids": names} if named else {}
                metric.update_features(part, real=bool(real), **labels)
    return metric


def windowed(rows):
    """Videos of one to three windows, two to a prompt, without ids."""
    metric, sides = FrechetVideoDistance(num_features=6), features()
    for real, side in enumerate(sides):
        clips = side.split([1, 3, 2, 1, 3, 2, 1, 3, 2, 2])[rows]
        units = [f"prompt {number // 2}" for number in range(10)][rows]
        if clips:
            metric.update_features(clips, real=bool(real), units=units)
    return metric


def clip_results(share):
    """What metrics of clips say of these of 20 clips, of one process or of this rank."""
    metrics = {"psnr": PSNR(curves=True), "recall": Recall(), "named": PSNR()}
    codes = torch.arange(26.0).view(26, 1, 1).expand(26, 1, 3)
    scene = Scene(codes, torch.zeros(4, 1, 4), size=4)
    for seed in range(20)[share]:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randint(0, 2, (1, 4, 1, 4, 4), generator=generator).float()
        latents[:, :, :, 3] = 0
        pixels, reference = torch.rand(2, 1, 4, 3, 32, 32, generator=generator)
        metrics["psnr"].update(pixels, reference, prompts=[f"prompt {seed // 3}"])
        metrics["named"].update(pixels, reference, ids=[seed % 19], units=[seed % 19])
        if seed < 19:
            metrics["recall"].update(latents, pixels, scene)
    metrics["named"].reset()  # a process that forgets all must still meet the others
    for seed in range(20)[share]:
        pixels = torch.rand(2, 1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed % 19))
        metrics["named"].update(*pixels, ids=[seed % 19])
    found = {name: [metric.compute().item()] for name, metric in metrics.items()}
    found["interval"] = list(metrics["psnr"].interval())
    return found


def results(share):
    """Value, report and synced sums of every metric, of one process or of this rank."""
    found = {}
    for name, (kind, options) in METRICS.items():
        metric = fill(kind(num_features=6, **options), share)
        before = shown(metric)
        found[name] = {"value": metric.compute().item(), "report": asdict(metric.report())}
        with metric.sync_context():
            sums = {key: state for key, state in shown(metric).items() if "outer" in key}
        found[name] |= {"sums": sums, "kept": shown(metric) == before}
    return found


def shown(metric):
    """The states as plain numbers; of lists, how many they hold."""
    states = metric.metric_state.items()
    return {key: len(s) if isinstance(s, list) else s.tolist() for key, s in states}


def work(rank, folder):
    """What one of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {name: results(shares[rank]) for name, shares in SHARES.items()}
    found |= {f"clips-{name}": clip_results(shares[rank]) for name, shares in SHARES.items()}
    # Both ranks see the last four clips, as with a sampler that pads.
    metric = fill(FrechetVideoDistance(num_features=6), (slice(0, 20), slice(16, 20))[rank])
    found["padded"] = metric.compute().item()
    for name, rows in (("windowed", slice(0, 3)), ("turned", slice(3, 10))):
        shares = rows, slice(3, 10) if name == "windowed" else slice(0, 3)
        found[name] = asdict(windowed(shares[rank]).report())
    for name, shares in SHARES.items():
        metric = fill(FrechetVideoDistance(num_features=6), shares[rank], named=False)
        found[f"unnamed-{name}"] = asdict(metric.report())
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, as most of the time of new processes would go by in imports.
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
