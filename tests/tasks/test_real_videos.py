"""Sets compared with real videos of a folder or of shards, on one rank and on two."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_kv.cli import main

ROOT = Path(__file__).parents[2]
POLICY = "sliding-window@3f"
NAMES = ("fvd/panorama-encoder", "kvd/panorama-encoder")
WORDS = [
    *("evaluate", "--data.shards", str(ROOT / "data/panorama-quick"), "--prompts", "3"),
    *("--frames", "24", "--context_frames", "6", "--policies", f"[full,{POLICY}]"),
    *("--metrics", f"[{','.join(NAMES)}]", "--videos", "0", "--threads", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
]
TOOLS = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(TOOLS / "torchrun"), "--nproc-per-node", "2", str(ROOT / "tools/evaluate.py")],
    "fabric": [
        *(str(TOOLS / "fabric"), "run", "--accelerator", "cpu", "--devices", "2"),
        *("--strategy", "ddp", str(ROOT / "tools/evaluate.py"), "--"),
    ],
}


def values(run):
    """What the summary says, and what a logger was told."""
    found = json.loads((run / "summary.json").read_text())["policies"][POLICY]["metrics"]
    with (run / "log" / "metrics.csv").open() as file:
        told = next(csv.DictReader(file))
    logged = [float(told[f"{POLICY}/{name}"]) for name in NAMES]
    return {name: found[name] for name in NAMES}, logged


@pytest.mark.slow
def test_two_ranks_give_the_distances_of_one_to_a_folder_and_to_shards(tmp_path, video):
    for seed in range(5):  # an odd number, and windows that are left over
        video(tmp_path / "real" / f"{seed}.mp4", seed, frames=8 * (1 + seed % 2) + seed, noise=2.0)
    shards = ["--name", "real", "--out", str(tmp_path / "shards"), "--per_shard", "2"]
    main(["shards", "make", str(tmp_path / "real"), *shards])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    found = {}
    for real, how in (("real", "torchrun"), ("shards", "fabric")):
        given = ["--real", str(tmp_path / real), "--out"]
        main([*WORDS, *given, str(tmp_path / f"{real}-1")])
        words = [*LAUNCHERS[how], *WORDS[1:], *given, str(tmp_path / f"{real}-2")]
        env = clean | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        for ranks in (1, 2):
            found[real, ranks] = values(tmp_path / f"{real}-{ranks}")
        records = (tmp_path / f"{real}-2" / "records").glob("*.jsonl")
        lines = [json.loads(line) for file in records for line in file.read_text().splitlines()]
        assert {record["rank"] for record in lines} == {0, 1}
    for real in ("real", "shards"):
        (told, logged), (other, other_logged) = found[real, 1], found[real, 2]
        assert other == told, "to the last digit"
        assert other_logged == pytest.approx(logged, rel=1e-12, abs=1e-15)
        assert logged == pytest.approx([told[name]["mean"] for name in NAMES], rel=1e-12)
        assert all(each["mean"] > 0 and each["clips_real"] == 5 for each in told.values())
    assert found["shards", 1][1] == pytest.approx(found["real", 1][1], rel=1e-12)
