"""The command that shows that the statistics are right: it says so, and would notice if not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "tools" / "simulate_statistics.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("simulate_statistics", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_figures_of_a_quick_run_lie_where_they_must(tool, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert tool.main(["--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows = found["figures"]
    assert found["simulations"] == 200
    # 200 data sets: three standard errors are 4.6 % at 5 %, and 8.5 % at 80 %.
    expected = {"interval": (88, 100), "sign flip": (0.4, 11.2), "not worse": (0.4, 11.2)}
    expected |= {"Holm": (0, 9.7), "power": (71.5, 91)}
    checked = [row for row in rows if row["allowed"]]
    for row in checked:
        low, high = expected[row["what"]]
        assert low <= row["percent"] <= high, row
    assert {row["what"] for row in checked} == set(expected)
    alone = next(row for row in rows if row["what"] == "alone")
    assert alone["percent"] > 40  # what Holm is for
    assert "broken" not in capsys.readouterr().out


def test_intervals_that_are_too_narrow_are_broken(tool, monkeypatch):
    real = tool.bca_interval
    monkeypatch.setattr(
        tool, "bca_interval", lambda values, resamples: real(values, 0.8, resamples)
    )
    rows = [row for row in tool.intervals(np.random.default_rng(0), 200, (16,)) if row.allowed]
    assert rows and all(row.broken for row in rows)


def test_a_family_without_correction_is_broken_and_ends_in_1(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "holm", list)
    monkeypatch.setattr(tool, "intervals", lambda *_: [])
    monkeypatch.setattr(tool, "false_differences", lambda *_: [])
    monkeypatch.setattr(tool, "false_recommendations", lambda *_: [])
    monkeypatch.setattr(tool, "powers", lambda *_: [])
    assert tool.main(["--simulations", "60"]) == 1
    assert "broken" in capsys.readouterr().out


def test_no_simulation_is_refused(tool, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(["--simulations", "0"])
    assert error.value.code == 2
    assert "--simulations 0" in capsys.readouterr().err
