"""Head tables: by name, from the files that authors publish, and those that cannot work."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import sessions

from lightning_kv.cli import main
from lightning_kv.models import load_model
from lightning_kv.models.catalogue import CATALOGUE
from lightning_kv.policies import curve_tables, tables
from lightning_kv.policies.budget.importance import budgets
from lightning_kv.policies.head_curves import HeadCurves, described
from lightning_kv.policies.registry import build_budget, policy_from_dict, policy_to_dict
from lightning_kv.policies.tables import HeadTable, shipped

WAN = replace(sessions.GEOMETRY, layers=30, heads=12)
KINDS = {"wave": -1, "anchor": 1, "veil": 2}


@pytest.mark.parametrize("name", shipped())
def test_what_is_shipped_says_whose_it_is(name):
    own = shipped()[name]
    assert own.about and own.source and own.method
    shape = {len(row) for row in own.rows}
    assert len(shape) == 1
    for model in own.models:
        of = CATALOGUE[model].config if model in CATALOGUE else load_model(model).network.config
        assert (len(own.rows), *shape) == (of.layers, of.heads)
    assert HeadTable.of(name).rows == own.rows


def test_a_shipped_table_is_given_by_its_bare_name():
    part = build_budget({"part": "importance", "importance": "focused-forcing-wan-1.3b"})
    assert part.importance.rows[0][0] == 0.30059
    assert part.importance.file == "focused-forcing-wan-1.3b" and len(part.importance.sha256) == 64
    plain = json.loads(json.dumps(policy_to_dict(policy_from_dict(
        {"name": "x", "select": {"part": "focused", "budget": part}}
    ))))  # fmt: skip
    assert policy_from_dict(plain).select.budget == part


def test_an_unknown_name_hears_the_nearest_and_the_list():
    with pytest.raises(ValueError, match=r"Did you mean 'focused-forcing-wan-1.3b'\? Shipped: "):
        build_budget({"part": "importance", "importance": "focused-forcing-wan-1.3"})
    with pytest.raises(ValueError, match="Or give the path of a file"):
        HeadTable.read("nothing-like-it", "labels")


def test_a_table_of_another_shape_names_those_that_fit():
    part = build_budget({"part": "importance", "importance": [[0.5, 1.0]]})
    with pytest.raises(ValueError, match=r"another model.*30 layers of 12.*focused-forcing-wan"):
        part.check(WAN, 1)
    with pytest.raises(ValueError, match=r"2 layers of 3 heads\. Give one value for each"):
        part.check(sessions.GEOMETRY, 1)


def test_auto_is_the_table_that_is_shipped_for_the_model():
    part = build_budget({"part": "importance", "importance": "auto"})
    known = replace(WAN, model="self-forcing")
    part.check(known, 1)
    assert part.importance.rows_for(known) == shipped()["focused-forcing-wan-1.3b"].rows
    assert part.importance == replace(part).importance and part.importance.sha256
    with pytest.raises(ValueError, match=r"for the model 'mine', .*Shipped and of this shape: foc"):
        part.check(replace(WAN, model="mine"), 1)
    with pytest.raises(ValueError, match=r"a model without a name, .*Give one value for each head"):
        part.check(sessions.GEOMETRY, 1)


@pytest.fixture
def curves(tmp_path):
    """A file of head curves of the embedded model, as `calibrate` has them."""
    geometry = load_model("panorama").network.geometry()
    rng = torch.Generator().manual_seed(0)
    own = HeadCurves(
        (1, 2, 3),
        {"mass/gn": torch.rand(3, 6, 4, 3, generator=rng)},
        {"history": torch.zeros(6, 4), "zero": torch.rand(6, 4, generator=rng)},
        about={
            "model": {"name": "panorama", "geometry": described(geometry)},
            "data": {"prompts": ["a", "b", "c"]},
        },
    )
    path = tmp_path / "panorama.safetensors"
    own.save(path)
    return path, own, geometry


def test_focused_forcings_own_importance_is_read_from_a_file_of_head_curves(curves):
    """The frames that its rule gives are those of the curves' own rule of that name."""
    path, own, geometry = curves
    part = build_budget({"part": "importance", "amount": "6f", "importance": str(path)})
    part.check(geometry, 1)
    assert part.importance.rows == tuple(map(tuple, own.importance["zero"].double().tolist()))
    told = {"part": "calibrated", "amount": "3f", "scorer": "mass", "heads": str(path)}
    same = build_budget(told | {"rule": "focused", "importance": "zero"})
    assert budgets(part.importance.rows, 2.0, 3, 1) == same.solved(geometry)


def test_what_a_file_of_head_curves_does_not_have_is_said(curves, tmp_path):
    path, own, _ = curves
    with pytest.raises(ValueError, match=r"has no labels/zero.*labels are in the folder beside it"):
        HeadTable.of(str(path), "labels")
    other = tmp_path / "other.safetensors"
    replace(own, importance={}).save(other)
    with pytest.raises(ValueError, match=r"has no importance/zero.*--validate 4"):
        HeadTable.of(str(other), "importance")
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"'.*other.safetensors' is no head table: SafetensorErr"):
        HeadTable.of(str(other), "importance")


@pytest.fixture
def shipping(curves, monkeypatch):
    """The folder of shipped tables with such a file, and what it says of itself, in it."""
    folder = curves[0].parent / "heads"
    shutil.copytree(tables.HEADS, folder)
    for path in (curves[0], curves[0].with_suffix(".json")):
        shutil.copy(path, folder)
    caches = (tables.shipped, tables._digest, curve_tables.shipped_curves, curve_tables._digest)
    monkeypatch.setattr(tables, "HEADS", folder)
    monkeypatch.setattr(curve_tables, "HEADS", folder)
    for own in caches:
        own.cache_clear()
    yield curves[1:]
    for own in caches:
        own.cache_clear()


def test_a_shipped_file_of_head_curves_is_found_and_listed(shipping, capsys):
    own, geometry = shipping
    part = build_budget({"part": "importance", "amount": "6f", "importance": "auto"})
    part.check(geometry, 1)
    rows = tuple(map(tuple, own.importance["zero"].double().tolist()))
    assert part.importance.rows_for(geometry) == rows == HeadTable.of("panorama").rows
    solved = build_budget({"part": "calibrated", "amount": "2f", "scorer": "mass"}).solved(geometry)
    assert solved == own.solve("optimal", 2)
    main(["list", "heads", "panorama", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["about"].startswith("What heads lose with 1 to 3 frames (mass/gn)")
    assert row["source"] == "lightning-kv calibrate, 3 prompts" and row["models"] == "panorama"
    lowest, highest = min(map(min, rows)), max(map(max, rows))
    assert row["heads"] == f"6 layers of 4: from {lowest:.5g} to {highest:.5g}"


def test_the_first_method_that_has_a_table_for_the_model_is_taken(shipping):
    """DuoAttention takes labels of its own rule where they are shipped, else Forcing-KV's."""
    _, geometry = shipping
    auto = {"name": "x", "retain": "duo-attention"}

    def rows(of):
        return policy_from_dict(auto).retain.labels.rows_for(of)

    for own in tables.HEADS.glob("duo-attention-*"):
        own.unlink()
    tables.shipped.cache_clear()
    assert rows(geometry) == shipped()["forcing-kv-panorama"].rows
    before = policy_from_dict(auto).retain.labels.sha256
    told = {"method": "duo-attention", "model": ["panorama"], "about": "-", "source": "-"}
    made = [["retrieval", "streaming"] * 2] * 6
    path = tables.HEADS / "duo-attention-panorama.json"
    path.write_text(json.dumps(told | {"labels": made}))
    tables.shipped.cache_clear()
    tables._digest.cache_clear()
    assert rows(geometry) == tuple(map(tuple, made))
    assert rows(replace(WAN, model="longlive")) == shipped()["forcing-kv-longlive"].rows
    assert policy_from_dict(auto).retain.labels.sha256 != before
    with pytest.raises(ValueError, match=r"table of 'duo-attention' or 'forcing-kv' is shipped"):
        rows(replace(WAN, model="mine"))


def test_models_say_their_name():
    assert load_model("panorama").network.geometry().model == "panorama"
    assert CATALOGUE["longlive"].config.geometry().model == "longlive"
    assert replace(WAN, model="longlive") == WAN  # sizes alone make geometries equal


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[-1, 2.0], ["anchor", 1]], (("wave", "veil"), ("anchor", "anchor"))),
        ([["veil", "wave"]], (("veil", "wave"),)),
    ],
)
def test_labels_are_words_or_the_numbers_that_stand_for_them(rows, words):
    assert HeadTable.of(rows).labelled("mine", "labels", KINDS).rows == words


@pytest.mark.parametrize("rows", [[], [[0]], [["wav"]], [[True]], [[1.5]], ["wave"], [[None]]])
def test_labels_that_mean_nothing(rows):
    with pytest.raises(ValueError, match=r"'mine' needs `labels`.*wave \(-1\), anchor \(1\), veil"):
        HeadTable.of(rows).labelled("mine", "labels", KINDS)


def test_words_in_their_order_stand_for_numbers_from_0():
    found = HeadTable.of([[0, 1, "static"]]).labelled("mine", "labels", ("static", "dynamic"))
    assert found.rows == (("static", "dynamic", "static"),)


def heads(static, dynamic, layer=0):
    return {"layer_idx": layer, "local_head": static, "temporal_head": dynamic}


def test_files_as_authors_publish_them(tmp_path):
    path = tmp_path / "heads.json"
    expected = (("dynamic",) * 3, ("static", "dynamic", "static"))
    for layers in ([heads([2, 0], [1], 1)], {"layers": [heads([0, 2], [1], 1)], "num_layers": 2}):
        path.write_text(json.dumps(layers))  # a layer that is missing is all dynamic
        assert HeadTable.read(path, "labels").rows == expected
    newer = {"layer_idx": 1, "static_head": [2, 0], "dynamic_head": [1]}
    path.write_text(json.dumps({"layers": [newer]}))
    assert HeadTable.read(path, "labels").rows == expected
    path.write_text(json.dumps([heads([0, 1], [1])]))
    with pytest.raises(ValueError, match="does not name each of 3 heads once"):
        HeadTable.read(path, "labels")
    (tmp_path / "best.csv").write_text("-1,2\n1,1\n")
    assert HeadTable.read("best.csv", "labels", tmp_path).rows == ((-1.0, 2.0), (1.0, 1.0))
    (tmp_path / "full.tsv").write_text("1.00e+00\t-5.3e-04\n0.5\t0\n")
    assert HeadTable.read("full.tsv", "labels", tmp_path).rows == ((1.0, -5.3e-4), (0.5, 0.0))
