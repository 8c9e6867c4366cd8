"""Run directories made by hand: their numbers, pictures and traces are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_kv.report.entries import PageRun
from lightning_kv.report.tradeoff_charts import Chart
from lightning_kv.runs.directory import RunDirectory, fingerprint
from lightning_kv.runs.summary import MetricInfo, summarise
from lightning_kv.runs.traces import write_traces
from lightning_kv.runs.video import write_mp4

FRAMES, CHUNK, LAYERS, HEADS = 12, 3, 2, 2
METRICS = {
    "psnr": MetricInfo("dB", True, "10 log10(1 / mse) < the better", "this is the reference", True),
    "recall": MetricInfo("share", True, "share of columns that come back"),
    "ruler_error": MetricInfo("latent^2", False, "mse of the ground row"),
}


def window_trace(kept: int) -> dict[str, np.ndarray]:
    """All heads keep and read the newest ``kept`` frames of the past, and the chunk itself."""
    chunks = FRAMES // CHUNK
    held = np.zeros((chunks, LAYERS, HEADS, FRAMES), np.uint8)
    for chunk in range(chunks):
        held[chunk, :, :, max(0, chunk * CHUNK - kept) : (chunk + 1) * CHUNK] = 255
    return {
        "held": held,
        "read": held[:, None].copy(),
        "weight": (held / 255).astype(np.float16),
    }


def a_record(policy: str, key: str, prompt: str, recall: float | None, psnr: float | None) -> dict:
    start = [None] * 4
    curve = [None if recall is None else recall / (1 + f) for f in range(FRAMES - 4)]
    return {
        "policy": policy,
        "key": key,
        "prompt": prompt,
        "metrics": {"psnr": psnr, "recall": recall, "ruler_error": 0.0004},
        "curves": {"recall": start + curve, "psnr": [psnr] * FRAMES},
        "cost": {
            "kv_bytes_peak": 5_000_000 if policy == "full" else 1_000_000,
            "kv_bytes_mean": 400_000.0,
            "kv_rows_read": 10,
            "kv_rows_scored": 0,
            "kv_read_fraction": 1.0 if policy == "full" else 0.25,
            "kv_scored_fraction": 0.0,
            "seconds_per_chunk": [0.04, 0.05],
        },
    }


def spread(values: list[float]) -> tuple[float, float] | None:
    """An interval that is easy to check."""
    return (min(values), max(values)) if len(values) > 1 else None


@pytest.fixture
def no_charts(monkeypatch):
    """Pages with empty frames where charts stand: most of the time of a page goes into those."""
    for drawn in ("tradeoff_charts.tradeoffs", "curves", "chunk_curves"):
        chart = Chart(drawn, "<svg></svg>")
        monkeypatch.setattr(f"lightning_kv.report.page.{drawn}", lambda *_, own=chart: [own])


@pytest.fixture(scope="session")
def make_run() -> Callable[..., PageRun]:
    """Makes a run with ``recall[policy][prompt]``; ``None`` stands for a clip not measured."""

    def make(
        path: Path,
        recall: dict[str, list[float | None]],
        prompts: list[str],
        pictured: int = 99,
        total: int | None = None,
        differences: bool = False,
        samples: int = 1,
    ) -> PageRun:
        described = {"model": "panorama", "at": str(path)}
        mark, run = fingerprint(described), RunDirectory(path)
        policies = {name: {"name": name} for name in recall}
        run.open(mark, described, {"reference": "full", "policies": policies})
        run.config.write_text("prompts: 3  # <worlds>\n")
        for number, prompt in enumerate(prompts):  # `samples` in a row are of one prompt
            unit, sample = f"k{number // samples * samples}", number % samples
            key = f"{unit}#{sample}" if sample else unit
            for name, values in recall.items():
                if number < len(values):
                    psnr = None if name == "full" else 20.0 + number
                    clip = a_record(name, key, prompt, values[number], psnr)
                    run.append(0, clip | ({"unit": unit} if samples > 1 else {}))
            if number < pictured:
                grey = np.full((5, 16, 16, 3), 40 + 30 * number, np.uint8)
                write_mp4(run.videos / f"{key}.mp4", grey, 8)
                if differences:
                    write_mp4(run.differences / f"{key}.mp4", grey + 100, 8)
                traces = {name: window_trace(3 * i) for i, name in enumerate(recall)}
                write_traces(run.traces / f"{key}.npz", traces)
        summary = summarise(
            run.records(),
            reference="full",
            policies=policies,
            metrics=METRICS,
            run={
                "prompts": total or len(prompts) // samples,
                **({"samples": samples} if samples > 1 else {}),
                "frames": FRAMES,
                "context_frames": 4,
                "rate": 8.0,
                "difference_gain": 4,
                "seed": 7,
                "device": "cpu",
                "versions": {"torch": "9.9"},
            },
            model={"name": "panorama"},
            fingerprint=mark,
            interval=spread,
        )
        run.summary.write_text(json.dumps(summary))
        return PageRun(run, summary)

    return make


@pytest.fixture
def add_statistics() -> Callable[[PageRun], PageRun]:
    """Puts statistics into a summary: every number can be told from every other."""

    def add(run: PageRun) -> PageRun:
        summary = run.summary
        rivals = [name for name in summary["policies"] if name != "full"]
        for number, name in enumerate(rivals, 1):
            policy = summary["policies"][name]
            policy["metrics"]["recall"]["paired"] = {
                "difference": -0.125 * number,
                "ci95": [-0.5, -0.0625],
                "se": 0.01,
                "p": 0.001 * number,
                "p_holm": 0.02 * number,
                "d_z": -1.5,
                "n": 3,
            }
            ends = {"mean": 0.25 * number, "ci95": [0.125, 0.5], "n": 3}
            slope = {"mean": -0.03125 * number, "ci95": None, "n": 3}
            against = {"difference": 0.375, "ci95": [0.25, 0.75], "p": 0.03125, "p_holm": None}
            policy["drift"] = {
                "recall": {"start_end": ends, "slope": slope, "vde_late": ends, "paired": against}
            }
        front = {name: {"front": True, "p": 0.875} for name in rivals[:1]}
        front |= {name: {"front": False, "p": 0.0625} for name in rivals[1:2]}
        front |= {name: {"front": False, "p": 0.0} for name in rivals[2:]}
        front["full"] = {"front": True, "p": 1.0}
        summary["pareto"] = {"recall": {"kv_bytes_peak": front, "seconds_per_chunk_p50": front}}
        summary["family"] = {"tests": len(rivals), "correction": "Holm", "level": 0.05}
        return run

    return add


def a_metric(mean: float | None, better: bool | None = True, **more: object) -> dict:
    """One metric of one policy, as a summary has it."""
    plain = {"mean": mean, "ci95": None, "n": 3, "unit": "", "higher_is_better": better}
    plain |= {"recipe": "how", "against_reference": False, "identical": None, "comparable": True}
    return plain | {"sets": False, "status": "ok", "paired": None} | more


@pytest.fixture
def add_metrics() -> Callable[[PageRun], PageRun]:
    """Puts metrics of every kind into a summary, twenty and more in all."""

    def add(run: PageRun) -> PageRun:
        for number, policy in enumerate(run.summary["policies"].values()):
            metrics = policy["metrics"]
            metrics |= {f"quality_{i}": a_metric(0.5 + number / 8) for i in range(16)}
            metrics["brightness"] = a_metric(0.25 + number / 8, None)
            sets = {
                "sets": True,
                "n": 48,
                "windows": 96,
                "n_real": 32,
                "clips_real": 32,
                "windows_real": 64,
                "se": 2.0,
                "against": "the real set",
            }
            metrics["fvd/panorama-encoder"] = a_metric(
                120.5 + number, False, null=88.25, comparable=False, **sets
            )
            metrics["fvd/i3d"] = a_metric(
                None, False, sets=True, status="no value: unavailable: no <weights> here"
            )
        return run

    return add
