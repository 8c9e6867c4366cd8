"""A part of a package of its own, in an evaluation on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = ["--prompts", "2", "--frames", "24", "--context_frames", "9", "--videos", "0"]
OWN = '''
from dataclasses import dataclass
from typing import ClassVar

from lightning_kv.policies.base import UnitPart


@dataclass(frozen=True)
class Thinned(UnitPart):
    """Keep every n-th frame.

    Args:
        every: Frames between two that are kept.
    """

    name: ClassVar[str] = "thinned"
    every: int = 2

    def scores(self, view, state):
        return -(view.frame_ids % self.every).double().view(1, 1, -1)
'''


def evaluate(folder, policies, ranks):
    words = ["evaluate", "--policies", policies, *SETTINGS, "--data.shards"]
    words += [str(ROOT / "data" / "panorama-fast13"), "--trainer.devices", str(ranks)]
    return subprocess.run(
        [sys.executable, "-m", "lightning_kv", *words, "--out", "run", "--metrics", "[recall]"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"},
    )


@pytest.mark.slow  # three processes
def test_by_address_by_entry_point_and_in_a_file_on_two_ranks(tmp_path):
    """The address is found in the current folder, the entry point where packages are installed."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "mine.py").write_text(OWN.replace('"thinned"', '"mine-thinned"'))
    site = tmp_path / "site"
    (site / "their_pkg-1.0.dist-info").mkdir(parents=True)
    (site / "their_pkg.py").write_text(OWN)
    info = site / "their_pkg-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lightning_kv.policies]\nt = their_pkg:Thinned\n")
    (tmp_path / "x.yaml").write_text(
        "name: from-file\nretain: {part: 'my_pkg.mine:Thinned', every: 3, budget: 5f}\n"
    )
    names = ["full", "my_pkg.mine:Thinned@9f", "thinned@9f", "from-file", "from-file@6f"]
    given = "[full,my_pkg.mine:Thinned@9f,thinned@9f,x.yaml,x.yaml@6f]"

    made = evaluate(tmp_path, given, 2)
    assert made.returncode == 0, made.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["policies"]) == names
    lines = [p.read_text().splitlines() for p in (tmp_path / "run" / "records").iterdir()]
    assert [len(own) for own in lines] == [len(names)] * 2, "one prompt on each rank"
    recall = {n: own["metrics"]["recall"]["mean"] for n, own in summary["policies"].items()}
    assert recall["thinned@9f"] == recall["my_pkg.mine:Thinned@9f"], "the same code"
    assert recall["thinned@9f"] < recall["full"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())["described"]
    assert set(run["modules"]) == {"my_pkg.mine", "their_pkg"}
    assert run["policies"]["from-file"]["retain"]["part"] == "my_pkg.mine:Thinned"
    assert run["policies"]["thinned@9f"]["retain"]["part"] == "thinned"

    source = tmp_path / "my_pkg" / "mine.py"
    source.write_text(source.read_text() + "\n# another version\n")
    again = evaluate(tmp_path, given, 1)
    assert again.returncode == 2
    assert "holds another run" in again.stderr
    assert "modules.my_pkg.mine" in again.stderr
