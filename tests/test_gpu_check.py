"""The check of a GPU, on a CPU: every step runs, and what it writes is complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_kv.cache.passes import Pass
from lightning_kv.tasks.benchmark.waits import counting

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_check.sh"
STEPS = ["tests", "parity", "seeds", "bench", "profile"]


def check(out, *words):
    words = ["bash", SCRIPT, "--device", "cpu", "--preset", "tiny", "--out", out, *words]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    found = json.loads((out / "gpu_check.json").read_text())
    return done, found, (out / "gpu_check.txt").read_text()


@pytest.mark.slow  # five processes
def test_every_step_runs_without_a_gpu(tmp_path):
    done, found, text = check(tmp_path / "out")
    steps = found["steps"]
    assert done.returncode == 0, text + done.stderr
    assert list(steps) == STEPS and found["environment"]["torch"] == torch.__version__
    for name, step in steps.items():
        assert step["status"] == "ok" or step["reason"], name
        assert f"== {name}: {step['status']}" in text
    assert all(steps[name]["status"] == "ok" for name in ("seeds", "bench", "profile"))
    assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    assert {row["difference"] for row in steps["seeds"]["policies"].values()} == {0}
    rows = steps["bench"]["policies"]
    assert len(rows) == 10 and {"focused-once", "rolling-forcing, rolling"} <= set(rows)
    for name, row in rows.items():
        assert row["status"] == "ok" and row["speedup"] > 0 and row["flop_limit"] >= 1, name
        assert row["ms_per_chunk"]["median"] > 0 and row["kv_held_bytes"] > 0
        if name == "full, rolling":  # only for the comparison
            continue
        waits = row["waits"]
        assert waits["total"] == sum(waits["by_pass"].values()) == waits["per_chunk"][6] > 0
        assert waits["passes"]["first"] == waits["passes"]["commit"] == 1
        assert waits["by_pass"]["denoise"] == 0, "the host knows how many rows are read"
        assert waits["lines"][0]["line"].startswith("lightning_kv/")
    assert rows["full"]["speedup"] == rows["full"]["flop_limit"] == 1
    limits = [rows[name]["flop_limit"] for name in ("sliding-window@18f", "sink-window@9f")]
    assert 1 < limits[0] < limits[1]
    assert steps["bench"]["overhead"]["ratio"] > 0
    profile = steps["profile"]
    assert len(profile["operations"]) == 10 and profile["host_ms"] > 0
    assert profile["device_ms"] is None and "device_ms" in found["null_means"]


@pytest.mark.slow
def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    broken = tmp_path / "golden.safetensors"
    broken.write_bytes(b"no weights")
    done, found, text = check(tmp_path, "--steps", "parity,profile", "--golden", broken)
    states = {name: step["status"] for name, step in found["steps"].items()}
    assert done.returncode == 1
    assert states == dict.fromkeys(STEPS, "not run") | {"parity": "failed", "profile": "ok"}
    assert "cannot be read as safetensors" in found["steps"]["parity"]["reason"]
    assert "not asked for" in text


X, SOME = torch.arange(4.0), torch.tensor([True, False, True, True])
ASKED = {
    "item": lambda: X.sum().item(),
    "is_nonzero": lambda: bool(X.sum() > 0),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "index": lambda: X[SOME],
    "nonzero": lambda: SOME.nonzero(),
    "where": lambda: torch.where(SOME),
    "masked_select": lambda: X.masked_select(SOME),
    "_unique2": lambda: X.unique(),
    "bincount": lambda: X.long().bincount(),
    "repeat_interleave": lambda: X.repeat_interleave(X.long()),
    "upload": lambda: torch.tensor([1.0], device=X.device),
}
FREE = {
    "index": lambda: X[torch.tensor([0, 1])],
    "repeat": lambda: X.repeat_interleave(2),
    "sized": lambda: X.repeat_interleave(X.long(), output_size=6),
    "fill": lambda: X.masked_fill(SOME, 0),
    "where": lambda: torch.where(SOME, X, X),
    "one_hot": lambda: torch.nn.functional.one_hot(X.long(), 4),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_would_wait_is_counted_once(name):
    with torch.inference_mode(), counting("cpu") as waits:
        ASKED[name]()
    assert [what for _, _, what, _ in waits.found] == [name]


@pytest.mark.parametrize("name", FREE)
def test_what_would_not_wait_is_not_counted(name):
    with torch.inference_mode(), counting("cpu") as waits:
        FREE[name]()
    assert waits.found == []


def test_waits_belong_to_the_pass_that_is_open():
    def sampler(*given):
        for phase, opens in (("denoise", True), ("denoise", False), ("commit", False)):
            yield Pass(phase, (0,), (0.0,), 0, opens=opens), X

    with torch.inference_mode(), counting("cpu") as waits:
        steps = waits.watched(sampler)()
        next(steps)
        for count in (1, 2, 3):
            for _ in range(count):
                X.tolist()
            with pytest.raises(StopIteration) if count == 3 else torch.inference_mode():
                steps.send(X)
    found = waits.summary(0)
    assert found["by_pass"] == {"first": 1, "denoise": 2, "commit": 3, "sampler": 0}
    assert found["passes"] == {"first": 1, "denoise": 1, "commit": 1}
    assert found["total"] == 6 and found["per_chunk"] == [6]
