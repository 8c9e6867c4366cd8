"""The file of head curves: written and read, opened without us, damaged, and of another model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from curves import drawn
from slow import sessions

from lightning_kv.policies.allocation import Knobs
from lightning_kv.policies.head_curves import HeadCurves

GEOMETRY = replace(sessions.GEOMETRY, chunk=2, model="mine")
GRID = (2, 3, 4, 6, 9)
KEYS = ("mass/gn", "top-attention/exact")


@pytest.fixture
def curves():
    return drawn(GEOMETRY, GRID, keys=KEYS, fingerprint="sha256:1")


def test_what_is_written_is_read(curves, tmp_path):
    path = tmp_path / "heads.safetensors"
    curves.save(path)
    again = HeadCurves.load(path)
    assert again.budgets == GRID and again.reach == 9 and again.shape == (2, 3)
    for name in ("curves", "importance", "extra"):
        mine, theirs = getattr(curves, name), getattr(again, name)
        assert list(mine) == list(theirs)
        assert all(
            torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine
        )
    about = {"format": "head-table", "version": 1, **curves.about}
    assert again.about == about
    assert json.loads((tmp_path / "heads.json").read_text()) == about
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before
    turned = dict(reversed(again.about.items())), dict(reversed(again.curves.items()))
    replace(again, about=turned[0], curves=turned[1]).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heads.json", "heads.safetensors"]


def test_the_file_opens_without_us(curves, tmp_path):
    path = tmp_path / "heads.safetensors"
    curves.save(path)
    found = load_file(path)
    assert found["grid/budget"].tolist() == list(GRID)
    assert found["grid/budget"].dtype == torch.int32
    for key in KEYS:
        own = found[f"prompt/{key}"]
        torch.testing.assert_close(found[f"curve/{key}"], own.mean(0))
        torch.testing.assert_close(found[f"curve/{key}/se"], own.std(0) / 6**0.5)
    assert {"importance/history", "lag/mass"} <= found.keys()
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["lightning_kv"])["model"]["name"] == "mine"


def test_one_prompt_has_no_error(curves, tmp_path):
    path = tmp_path / "heads.safetensors"
    few = replace(curves, curves={k: v[:1] for k, v in curves.curves.items()})
    few.save(path)
    assert not any(name.endswith("/se") for name in load_file(path))
    with pytest.raises(ValueError, match=r"Give two prompts or more"):
        HeadCurves.load(path).solve("optimal", 4)
    assert len(few.solve("optimal", 4, shrink=False)) == 2


def test_an_expensive_metric_may_have_fewer_prompts(curves, tmp_path):
    own = {**curves.curves, "mass/exact": curves.curves["mass/gn"][:2]}
    replace(curves, curves=own).save(tmp_path / "heads.safetensors")
    again = HeadCurves.load(tmp_path / "heads.safetensors")
    assert [len(x) for x in again.curves.values()] == [2, 6, 6]
    assert sum(map(sum, again.solve("optimal", 4, metric="exact"))) == 24


def test_solve_is_every_rule_and_total(curves):
    for mean, total in ((2, 12), (4, 24), (4.5, 27), (9, 54)):
        for rule in ("uniform", "optimal", "greedy", "log", "shuffled", "focused-matched"):
            found = curves.solve(rule, mean)
            assert sum(map(sum, found)) == total and [len(row) for row in found] == [3, 3]
    narrow = curves.solve("optimal", 4, least=3, most=5)
    assert {x for row in narrow for x in row} <= {3, 4, 5}
    assert curves.solve("optimal", 4) != curves.solve("optimal", 4, "top-attention", "exact")
    own = curves.solve("proportional", 4, importance="history")
    assert own != curves.solve("proportional", 4)
    few = curves.solve("levels", 4, knobs=Knobs(levels=2))
    assert len({x for row in few for x in row}) <= 2
    assert curves.solve("optimal", 4, objective="cvar")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"scorer": "h2o"}, "no curves h2o/gn .* It has mass/gn, top-attention/exact. Measure"),
        ({"metric": "exact"}, "no curves mass/exact in this head file"),
        ({"rule": "log", "importance": "zero"}, "no importance 'zero' .* It has history. Use one"),
        ({"least": 1}, "from 1 to 9 frames were not measured: the curves go from 2 to 9"),
        ({"least": 5, "most": 4}, "from 5 to 4 frames"),
        ({"mean": 9.5}, "mean of 9.5 frames cannot be divided into budgets from 2 to 9"),
    ],
)
def test_what_was_not_measured_is_not_solved(curves, asked, said):
    with pytest.raises(ValueError, match=said):
        curves.solve(**{"rule": "optimal", "mean": 4, **asked})


def damaged(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path)


def says(**other):
    """What spoils a file by what it says about itself."""

    def spoil(path):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["lightning_kv"]) | other
        save_file(load_file(path), path, {"lightning_kv": json.dumps(about)})

    return spoil


def lacking(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = {k: v for k, v in load_file(path).items() if k != "grid/budget"}
    save_file(found, path, metadata)


def short(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    found["prompt/mass/gn"] = found["prompt/mass/gn"][..., :3].contiguous()
    save_file(found, path, metadata)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damaged, "cannot be read as a head file"),
        (lambda path: path.write_text("{}"), "cannot be read as a head file"),
        (lambda path: path.write_bytes(b""), r"\(0 bytes\) cannot be read"),
        (foreign, "it has no 'lightning_kv'"),
        (says(version=7), "its format is 'head-table' 7"),
        (says(model="wan"), "cannot be read as a head file"),
        (says(model={"geometry": 3}), "does not say of which model"),
        (lacking, "it has no 'grid/budget'"),
        (short, "curves have the shapes"),
    ],
)
def test_files_that_are_none(curves, tmp_path, spoil, said):
    path = tmp_path / "heads.safetensors"
    curves.save(path)
    spoil(path)
    with pytest.raises(ValueError, match=said) as error:
        HeadCurves.load(path)
    assert "Make one with `lightning-kv calibrate" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"No head file at .*Make one with"):
        HeadCurves.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"No head file at .*Make one with"):
        HeadCurves.load(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budgets": (2, 3, 3, 6, 9)}, "not ascending"),
        ({"budgets": (2, 3)}, "for 2 budgets"),
        ({"curves": {}}, "shapes"),
        ({"curves": {"mass/gn": torch.zeros(0, 2, 3, 5)}}, "a curve has no prompts"),
        ({"curves": {"mass/ssim": torch.zeros(2, 2, 3, 5)}}, "'mass/ssim' is no SCORER/METRIC"),
        ({"curves": {"mass/gn": torch.full((2, 2, 3, 5), torch.nan)}}, "not finite"),
        ({"importance": {"history": torch.zeros(3, 2)}}, "an importance is not 2 x 3"),
    ],
)
def test_curves_that_are_none(curves, wrong, said):
    with pytest.raises(ValueError, match=f"no head curves: .*{said}"):
        replace(curves, **wrong)


def test_the_file_is_called_as_what_it_is(curves, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written to .*such as heads\.safetensors"):
        curves.save(tmp_path / "heads.json")


def test_a_name_of_the_format_is_not_for_others(curves, tmp_path):
    own = replace(curves, extra={"curve/mass/gn": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a name of the format's own\. Call it otherwise"):
        own.save(tmp_path / "x.safetensors")
