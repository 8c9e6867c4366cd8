"""Budgets from measured curves in a policy: what heads hold and read is what was solved."""

import hashlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from curves import drawn
from slow import passes, play, policy, session, sessions, stores, tape
from test_ada_kv import AdaScript

from lightning_kv import rollout
from lightning_kv.policies import curve_tables
from lightning_kv.policies.budget.calibrated import Calibrated
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.policies.registry import build_budget, policy_from_dict, policy_to_dict
from lightning_kv.testing import chunked, compare_decisions, random_tape
from lightning_kv.testing.candidate import headed
from lightning_kv.testing.conformance import obey

GEOMETRY, TOKENS = sessions.GEOMETRY, sessions.GEOMETRY.tokens
GRID = tuple(range(2, 9))


@pytest.fixture
def heads(tmp_path):
    """A file of head curves for the small geometry."""
    drawn(GEOMETRY, GRID, keys=("mass/gn", "recency/mass")).save(tmp_path / "heads.safetensors")
    return str(tmp_path / "heads.safetensors")


def budget(heads, amount="4f", **settings):
    return build_budget(
        {"part": "calibrated", "amount": amount, "heads": heads, "scorer": "mass", **settings}
    )


# -- what heads hold and read ----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["optimal", "greedy", "log", "shuffled", "pyramid"])
def test_every_head_holds_what_was_solved(heads, rule):
    solved = HeadCurves.load(heads).solve(rule, 4)
    assert len({x for row in solved for x in row}) > 1
    on = session(policy(retain={"part": "window", "budget": budget(heads, rule=rule)}))
    play(on, tape(passes(5, noisy=1)))
    for layer, expected in enumerate(solved):
        assert stores(on)[layer].memory.lengths == tuple(n * TOKENS for n in expected)


def test_budgets_take_the_curves_of_the_part_they_belong_to(tmp_path):
    names = ("mass", "recency", "snap-kv", "focused")
    path = tmp_path / "heads.safetensors"
    drawn(GEOMETRY, range(9), keys=[f"{name}/gn" for name in names]).save(path)
    curves, plain = (
        HeadCurves.load(path),
        build_budget({"part": "calibrated", "amount": "4f", "heads": str(path)}),
    )
    for kind, part, scorer, least in (
        ("select", "top-attention", "mass", 1),
        ("select", "focused", "focused", 1),
        ("retain", "window", "recency", 1),
        ("retain", "snap-kv", "snap-kv", 2),  # the newest chunk
    ):
        own = getattr(policy(**{kind: {"part": part, "budget": plain}}), kind).budget
        assert own.scorer == scorer
        assert own.solved(GEOMETRY) == curves.solve("optimal", 4, scorer, least=least)
        other = {"part": "calibrated", "amount": "4f", "heads": str(path), "scorer": "mass"}
        asked = getattr(policy(**{kind: {"part": part, "budget": other}}), kind).budget
        assert asked.scorer == "mass"  # what is said is done
    with pytest.raises(ValueError, match=r"no curves heavy-hitters/gn .* --scorers heavy-hitters"):
        policy(retain={"part": "heavy-hitters", "budget": plain})


@pytest.mark.parametrize("part", ["top-attention", "focused"])
def test_every_head_reads_what_was_solved(heads, part):
    made = policy(select={"part": part, "budget": budget(heads)})
    made.check(GEOMETRY, 2, 12)
    on = session(made)
    play(on, tape(passes(5, noisy=1)))
    solved = HeadCurves.load(heads).solve("optimal", 4)
    per_pass = [min(n, history) for history in (2, 4, 6, 8) for row in solved for n in row]
    assert on.costs[0].rows_read == 2 * 2 * TOKENS * sum(per_pass) * TOKENS


@pytest.mark.parametrize("rule", ["optimal", "pyramid"])
def test_the_embedded_model_holds_what_was_solved(panorama, tmp_path, rule):
    geometry = panorama.network.geometry()
    path = tmp_path / "heads.safetensors"
    drawn(geometry, range(3, 13)).save(path)
    own = {"part": "calibrated", "amount": "5f", "heads": str(path), "rule": rule, "scorer": "mass"}
    made = policy_from_dict({"name": "x", "retain": {"part": "snap-kv", "budget": own}})
    made.check(geometry, 3, 24)
    clip = rollout(panorama, made, "dusk fast n10 left", 24, decode=False)
    solved = HeadCurves.load(path).solve(rule, 5)
    for layer, expected in enumerate(solved):
        held = stores(clip.session)[layer].memory.lengths
        assert held == tuple(n * geometry.tokens for n in expected)


def test_tokens_may_be_a_mean_between_frames(heads):
    """18 tokens of 4 a frame are 4.5 frames; every head gets whole ones."""
    made = budget(heads, "18t")
    assert made.solved(GEOMETRY) == HeadCurves.load(heads).solve("optimal", 4.5)
    assert sum(map(sum, made.solved(GEOMETRY))) == 27
    policy(retain={"part": "window", "budget": made}).check(GEOMETRY, 2, 12)


def test_settings_reach_the_solver(heads):
    curves = HeadCurves.load(heads)
    asked = {"scorer": "recency", "metric": "mass", "objective": "cvar", "shrink": False}
    found = budget(heads, **asked, least="3f", most="6f").solved(GEOMETRY)
    assert found == curves.solve("optimal", 4, **asked, least=3, most=6)
    assert found != curves.solve("optimal", 4)
    most = budget(heads, "6f", rule="focused", importance="history").solved(GEOMETRY)
    assert most == curves.solve("focused", 6, importance="history")
    assert max(map(max, most)) == 6
    few = budget(heads, rule="levels", levels=2).solved(GEOMETRY)
    assert len({x for row in few for x in row}) <= 2


def test_uniform_and_pyramid_need_no_file():
    """They are those of the budget parts of these names."""
    at = Look(replace(GEOMETRY, chunk=2), 0)
    for rule in ("uniform", "pyramid"):
        own = build_budget({"part": "calibrated", "amount": "6f", "rule": rule, "scorer": "mass"})
        plain = build_budget({"part": rule, "amount": "6f"})
        own.check(at.geometry, 2)
        assert own.allowed(at) == plain.allowed(at) * 3
    turned = build_budget(
        {"part": "calibrated", "amount": "6f", "rule": "pyramid-reversed", "scorer": "mass"}
    )
    assert turned.solved(at.geometry) == own.solved(at.geometry)[::-1]


class Look:
    """As much of a view as a budget looks at."""

    def __init__(self, geometry, layer):
        self.geometry, self.layer, self.query_frames = geometry, layer, 2


# -- what is shared by the heads of a layer --------------------------------------------------


class LayersScript(AdaScript):
    """Ada-KV with a total of its own in each layer."""

    def __init__(self, frames, **settings):
        super().__init__(0, **settings)
        self.each = frames

    def divide(self, streams, step):
        self.frames = self.each[streams[0].layer]
        super().divide(streams, step)


@pytest.mark.parametrize("safe", [0.0, 0.9])
def test_layers_share_what_the_curves_give_them(tmp_path, safe):
    tape = random_tape(
        chunked([2] * 12, noisy=0), dtype=torch.float64, gain=3.0, seed=3, heads=4, grid=(1, 2)
    )
    geometry, path = tape.geometry, tmp_path / "heads.safetensors"
    drawn(geometry, range(2, 11), seed=4).save(path)
    own = {"part": "calibrated-layers", "amount": "5f", "heads": str(path), "scorer": "mass"}
    own["safe"] = safe
    made = policy_from_dict({"name": "x", "retain": {"part": "snap-kv", "budget": own}})
    totals = [sum(row) for row in HeadCurves.load(path).solve("optimal", 5)]
    assert len(set(totals)) > 1
    script = LayersScript([total / 4 for total in totals], safe=safe)
    found = compare_decisions(made, script, tape)
    assert found.equal == found.total >= 40
    assert len(script.lengths) >= 2, "heads should keep different numbers"


def test_layers_need_scores_that_can_be_compared(heads):
    own = {"part": "calibrated-layers", "amount": "4f", "heads": heads, "scorer": "mass"}
    made = policy(retain={"part": "oracle", "budget": own})
    with pytest.raises(ValueError, match=r"'calibrated-layers' compares scores .* uniform"):
        made.check(GEOMETRY, 2, 12)
    with pytest.raises(ValueError, match=r"safe=2 .* from 0 to 1"):
        build_budget({**own, "safe": 2})


# -- configuration ---------------------------------------------------------------------------


def test_a_policy_survives_plain_data_without_its_file(heads):
    made = policy_from_dict(
        {"name": "x", "select": {"part": "focused", "budget": budget(heads, rule="log")}}
    )
    table = made.select.budget.heads
    content = Path(heads).read_bytes()
    assert (table.file, table.path) == ("heads.safetensors", "")
    assert table.sha256 == hashlib.sha256(content).hexdigest()
    Path(heads).unlink()
    again = policy_from_dict(json.loads(json.dumps(policy_to_dict(made))))
    assert again == made and hash(again) == hash(made) and repr(again) == repr(made)
    assert again.select.budget.solved(GEOMETRY) == made.select.budget.solved(GEOMETRY)
    more = again.budgeted("6f").select.budget
    assert sum(map(sum, more.solved(GEOMETRY))) == 36
    with pytest.raises(ValueError, match=r"are mass/gn, mean, .* Give the path of the file again"):
        replace(more, shrink=False)


def test_a_path_is_relative_to_the_policy_file(heads):
    from lightning_kv import load_policy

    path = Path(heads).with_name("mine.yaml")
    path.write_text(
        "name: mine\nretain:\n  part: window\n  budget:\n    part: calibrated\n    amount: 4f\n"
        "    scorer: mass\n"
        "    heads: heads.safetensors\n"
    )
    assert load_policy(str(path)).retain.budget == budget(heads)


def test_auto_is_the_file_that_is_shipped_for_the_model(heads, monkeypatch, tmp_path):
    curve_tables.shipped_curves.cache_clear()
    curve_tables._digest.cache_clear()
    known = replace(GEOMETRY, model="mine")
    with pytest.raises(ValueError, match=r"shipped for the model 'mine', .*calibrate -o heads"):
        policy(retain={"part": "window", "budget": Calibrated("4f", scorer="mass")}).check(
            known, 2, 12
        )
    with pytest.raises(ValueError, match=r"a model without a name, .* uniform or pyramid"):
        Calibrated("4f", scorer="mass").check(GEOMETRY, 1)
    folder = tmp_path / "shipped"
    folder.mkdir()
    drawn(known, GRID, seed=7).save(folder / "mine.safetensors")
    monkeypatch.setattr(curve_tables, "HEADS", folder)
    curve_tables.shipped_curves.cache_clear()
    curve_tables._digest.cache_clear()
    made = Calibrated("4f", scorer="mass")
    made.check(known, 1)
    assert made.solved(known) == HeadCurves.load(folder / "mine.safetensors").solve("optimal", 4)
    assert made.heads.sha256 and not made.heads.curve
    curve_tables.shipped_curves.cache_clear()
    curve_tables._digest.cache_clear()


# -- the suite for any part ------------------------------------------------------------------


def both(heads):
    """A policy with curves for what is kept and for what is read."""
    kept = {"part": "calibrated", "amount": "6f", "heads": heads, "scorer": "mass"}
    read = {
        "part": "calibrated-layers",
        "amount": "5f",
        "heads": heads,
        "rule": "greedy",
        "scorer": "mass",
    }
    parts = {"retain": {"part": "snap-kv", "budget": kept}}
    return policy_from_dict(
        {"name": "x", **parts, "select": {"part": "top-attention", "budget": read}}
    )


def test_curves_are_dealt_to_the_heads_of_a_tape(heads):
    """From what is protected on; those of the model itself are left alone."""
    made, other = both(heads), replace(GEOMETRY, layers=3, heads=2, chunk=4)
    dealt = headed(made, other)
    dealt.check(other, 4, 30)
    table, old = dealt.retain.budget.heads, made.retain.budget.heads
    assert table.budgets == tuple(range(4, 11))
    flat = [x for row in old.curve for x in row]
    assert [x for row in table.curve for x in row] == flat and len(table.curve) == 3
    assert headed(made, GEOMETRY) == made


@pytest.mark.slow
def test_they_obey(heads):
    assert obey(both(heads)) == {}


# -- what cannot work ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"amount": "0.5"}, r"stays the same, and 0\.5 was given\. Give frames"),
        ({"amount": "2GiB"}, r"stays the same, and 2GiB was given\. Give frames"),
        ({"rule": "dynamic"}, r"No allocation rule 'dynamic'\. .* adaptive, or calibrated-layers"),
        ({"metric": "ssim"}, r"metric='ssim' .* Use one of: mass, output, gn, exact"),
        ({"objective": "median"}, r"objective='median' .* Use one of: mean, cvar"),
        ({"least": "8t"}, r"least='8t' .* is no number of frames. Give one, such as 4f"),
        ({"levels": 5}, r"levels=5 .* does not work\. Give 2 or 3"),
        ({"scorer": "h2o"}, r"no curves h2o/gn .* It has mass/gn, recency/mass\. Measure"),
        ({"importance": "zero"}, r"no importance 'zero'"),
        ({"heads": "nowhere.safetensors"}, r"No head file at .*Make one with"),
        ({"heads": [[1, 2]]}, r"is no file of head curves\. Give the path"),
    ],
)
def test_settings_that_cannot_work(heads, settings, said):
    with pytest.raises(ValueError, match=said):
        budget(**{"heads": heads, **settings})


def test_a_foreign_file_is_said(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"cannot be read as a head file: .* Make one with"):
        budget(str(path))


@pytest.mark.parametrize(
    ("settings", "sink", "said"),
    [
        ({"amount": "1f"}, 0, r"cannot be divided into budgets from 2 to 8"),
        ({"amount": "9f"}, 0, r"mean of 9 frames cannot be divided into budgets from 2 to 8"),
        ({"amount": "3f"}, 4, r"must lie between 4f and"),
        ({"amount": "5f"}, 4, r"Some head gets \d frames .* 4 are protected .* least: 4f"),
        ({"least": "9f"}, 0, r"from 9 to 8 frames were not measured"),
    ],
)
def test_amounts_that_cannot_work(heads, settings, sink, said):
    made = policy(retain={"part": "window", "sink": sink, "budget": budget(heads, **settings)})
    with pytest.raises(ValueError, match=said):
        made.check(GEOMETRY, 2, 22)
    fits = {"amount": "5f", "least": "4f"}
    policy(retain={"part": "window", "sink": 4, "budget": budget(heads, **fits)}).check(
        GEOMETRY, 2, 22
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layers": 30}, "another model: 2 layers of 3 heads .* This one has 30 layers of 3 heads"),
        ({"heads": 4}, "another model: .* 2 layers of 4 heads"),
        ({"head_dim": 24}, r"\(12 numbers each\).*\(24 numbers\)"),
    ],
)
def test_curves_of_another_model_are_refused(heads, other, said):
    for transfer in (False, True):
        made = policy(retain={"part": "window", "budget": budget(heads, transfer=transfer)})
        with pytest.raises(ValueError, match=said + ".*Give those of this model"):
            made.check(replace(GEOMETRY, **other), 2, 12)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"chunk": 2}, "measured with chunks of 3, and this rollout has chunks of 2"),
        ({"grid": (2, 3)}, r"a token grid of \[2, 2\], .* a token grid of \[2, 3\]"),
        ({"chunk": 1, "grid": (2, 3)}, r"a token grid of \[2, 2\] and chunks of 3, .* chunks of 1"),
    ],
)
def test_another_chunk_or_grid_is_refused_unless_allowed(tmp_path, other, said):
    path = str(tmp_path / "heads.safetensors")
    drawn(replace(GEOMETRY, chunk=3), GRID).save(path)
    made = policy(retain={"part": "window", "budget": budget(path)})
    with pytest.raises(ValueError, match=said + r".*or allow it \(transfer: true\)"):
        made.check(replace(GEOMETRY, **other), 2, 12)
    made = policy(retain={"part": "window", "budget": budget(path, transfer=True)})
    made.check(replace(GEOMETRY, **other), 2, 12)


def test_curves_of_another_model_of_the_same_sizes_are_warned_of(tmp_path):
    path = str(tmp_path / "heads.safetensors")
    own = replace(GEOMETRY, chunk=3, model="mine")
    drawn(own, GRID, fingerprint="sha256:1").save(path)
    made = policy(retain={"part": "window", "budget": budget(path)})
    with pytest.warns(UserWarning, match=r"for the model 'mine' are used for 'another'"):
        made.check(replace(own, model="another"), 2, 12)
    table = made.retain.budget.heads
    assert "for 'another'" in table.foreign("another", "sha256:1")
    assert "with other weights of 'mine' are used here" in table.foreign("mine", "sha256:2")
    assert not table.foreign("mine", "sha256:1") and not table.foreign("", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.check(own, 2, 12)
        made.check(replace(own, model="", chunk=0), 2, 12)


# -- another cache than that of the measurement ----------------------------------------------


def with_cache(tmp_path, retain, sink=0):
    """A file that says with which cache it was measured."""
    path = tmp_path / "cached.safetensors"
    reference = policy_to_dict(policy_from_dict({"name": "reference", "retain": retain}))
    curves = drawn(GEOMETRY, range(max(2, sink), 9))
    about = curves.about | {"cache": {"reference": reference, "reach": 8, "sink": sink}}
    replace(curves, about=about).save(path)
    return str(path)


WINDOW = {"part": "window", "budget": "8f"}
SUNK = {"part": "window", "budget": "8f", "sink": 3}


@pytest.mark.parametrize(
    ("measured", "held", "frames", "said"),
    [
        (WINDOW, WINDOW, 22, ""),
        (WINDOW, {"part": "everything"}, 10, ""),  # no more than 8 frames of history
        (WINDOW, {"part": "everything"}, 12, "8 frames of history held, .* has all frames"),
        (WINDOW, {"part": "window", "budget": "6f"}, 22, "8 frames .* has 6 frames"),
        (WINDOW, {"part": "window", "budget": "6f"}, 8, ""),
        (WINDOW, {"part": "window", "budget": "9f"}, 22, "8 frames .* has 9 frames"),
        (WINDOW, SUNK, 22, "the first 0 of the clip among them, .* the first 3 of the clip"),
        (SUNK, WINDOW, 22, "the first 3 of the clip among them, .* the first 0 of the clip"),
        (SUNK, WINDOW, 10, ""),  # nothing was dropped yet
        (SUNK, SUNK, 22, ""),
        (WINDOW, {"part": "window", "budget": "0.5"}, 22, ""),  # not known
        ({"part": "everything"}, {"part": "everything"}, 22, ""),
        ({"part": "everything"}, WINDOW, 22, "all frames of history held, .* has 8 frames"),
    ],
)
def test_reads_from_another_cache_are_refused_unless_allowed(
    tmp_path, measured, held, frames, said
):
    path = with_cache(tmp_path, measured)
    for transfer in (False, True):
        read = {"part": "top-attention", "budget": budget(path, transfer=transfer)}
        made = policy(retain=held, select=read)
        if said and not transfer:
            with pytest.raises(ValueError, match=said + r".*or allow it \(transfer: true\)"):
                made.check(GEOMETRY, 2, frames)
        else:
            made.check(GEOMETRY, 2, frames)


def test_first_frames_that_were_always_kept_must_be(tmp_path):
    path = with_cache(tmp_path, SUNK, sink=3)
    said = "the first 3 kept in every head, and 'test' has the first 0 kept"
    for kind in ("retain", "select"):
        part = {"retain": "window", "select": "top-attention"}[kind]
        parts = {"retain": SUNK, kind: {"part": part, "budget": budget(path, "5f")}}
        with pytest.raises(ValueError, match=said):
            policy(**parts).check(GEOMETRY, 2, 22)
    kept = {"part": "window", "sink": 3, "budget": budget(path, "5f")}
    policy(retain=kept).check(GEOMETRY, 2, 22)
    table = policy_from_dict(policy_to_dict(policy(retain=kept))).retain.budget.heads
    assert table.cache == kept["budget"].heads.cache and table.cache.kept == 3


def test_a_table_of_before_is_read_and_not_compared(heads):
    """What is known of weights and cache now, older results do not say."""
    made = policy(select={"part": "top-attention", "budget": budget(heads)})
    told = json.loads(json.dumps(policy_to_dict(made)))
    for name in ("weights", "cache"):
        del told["select"]["budget"]["heads"][name]
    policy_from_dict(told).check(GEOMETRY, 2, 22)
    assert not policy_from_dict(told).select.budget.heads.foreign("mine", "sha256:1")
