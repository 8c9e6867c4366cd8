"""The command behind the tables of docs/fitting.md."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "fitting.md").read_text()
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "simulate_budgets.py"
    spec = importlib.util.spec_from_file_location("simulate_budgets", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_few_draws_say_what_the_page_says(tool, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert tool.main(["--draws", "3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rules, noise = found["rules"], found["noise"]
    order = ("greedy", "log", "proportional", "focused-matched", "uniform")
    losses = [rules[rule] for rule in order]
    assert losses == sorted(losses) and losses[0] == pytest.approx(1, abs=1e-3)
    assert rules["levels"] < rules["proportional"] and min(rules["pyramid"], rules["shuffled"]) > 2
    kept = [row["kept, shrunk"] for row in noise.values()]
    assert kept == sorted(kept, reverse=True) and kept[0] > 0.9
    assert all(row["promised"] < 1 for row in noise.values())
    assert "rules that know the truth" in capsys.readouterr().out


RULES = ("uniform", "pyramid", "focused-matched", "proportional", "log", "levels", "shuffled")


@pytest.mark.parametrize(
    ("sigma", "label"), [(1.0, "1.0"), pytest.param(0.5, "0.5 (`--sigma 0.5`)", marks=SLOW)]
)
def test_rules_on_the_page_are_what_it_prints(tool, sigma, label):
    found = tool.rules(sigma, 6.0, 20, 0)
    assert f"| {label} | {' | '.join(f'{found[name]:.2f}' for name in RULES)} |" in PAGE


@pytest.mark.slow
def test_noise_on_the_page_is_what_it_prints(tool):
    far, near = tool.noise(1.0, 6.0, 20, 0), tool.noise(0.5, 6.0, 20, 0)
    for label, found, name in (
        ("sigma 1.0", far, "kept, shrunk"),
        ("sigma 0.5", near, "kept, shrunk"),
        ("sigma 0.5, not shrunk", near, "kept"),
        ("what is promised / true loss, not shrunk, sigma 0.5", near, "promised"),
    ):
        row = " | ".join(f"{own[name]:.2f}" for own in found.values())
        assert f"| {label} | {row} |" in PAGE


@pytest.mark.parametrize("wrong", [["--draws", "0"], ["--sigma", "0"], ["--mean", "4"]])
def test_nothing_to_draw_is_refused(tool, wrong, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(wrong)
    assert error.value.code == 2 and "Nothing to draw" in capsys.readouterr().err
