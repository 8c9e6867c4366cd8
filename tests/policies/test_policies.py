"""Names, amounts, the shared top-k flow, and what the presets do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import Rotary
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.part import PARTS
from lightning_kv.policies.registry import (
    discover,
    load_policy,
    policy_from_dict,
    policy_to_dict,
    preset,
    presets,
    sized,
)
from lightning_kv.policies.scored import top_units

GEOMETRY = Geometry(2, 3, 12, (2, 2), Rotary(12), 21)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_units_equal_a_slow_pick(data):
    heads, blocks, frames = (data.draw(st.integers(1, 4)) for _ in range(3))
    frames += 3
    values = st.lists(st.integers(-2, 2), min_size=frames, max_size=frames)
    score, protected, present, lengths = [], [], [], []
    for _ in range(heads * blocks):
        score.append(data.draw(values))
        there = data.draw(st.lists(st.booleans(), min_size=frames, max_size=frames))
        present.append(there)
        guarded = data.draw(st.lists(st.booleans(), min_size=frames, max_size=frames))
        protected.append([g and t for g, t in zip(guarded, there, strict=True)])
        lengths.append(data.draw(st.integers(0, frames)))
    shape = (heads, blocks, frames)
    picked = top_units(
        torch.tensor(score).double().view(shape),
        torch.tensor(lengths).view(heads, blocks),
        torch.tensor(protected).view(shape),
        torch.tensor(present).long().view(shape),
    ).view(-1, frames)
    for row in range(heads * blocks):
        chosen = [f for f in range(frames) if protected[row][f]]
        rest = [f for f in range(frames) if present[row][f] and not protected[row][f]]
        rest.sort(key=lambda f: (-score[row][f], f))
        chosen += rest[: max(0, lengths[row] - len(chosen))]
        assert picked[row].nonzero().flatten().tolist() == sorted(chosen)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("9f", 9, "f"),
        ("9360t", 9360, "t"),
        ("0.25", 0.25, "share"),
        ("1", 1, "share"),
        ("2GiB", 2 * 2**30, "B"),
        ("1.5KiB", 1536, "B"),
    ],
)
def test_amounts(text, value, unit):
    assert Amount.parse(text) == Amount(value, unit)


@pytest.mark.parametrize(
    "text", ["", "f", "-3f", "0f", "2.5f", "1.5", "0", "9 frames", "9F", "3GB"]
)
def test_amounts_that_are_none(text):
    with pytest.raises(ValueError, match=r"9f .*0\.25|\(9f, 9360t\)"):
        Amount.parse(text)


@pytest.mark.parametrize("name", presets())
def test_a_policy_survives_plain_data(name):
    made = preset(name)
    assert policy_from_dict(policy_to_dict(made)) == made
    assert made.name == name


def test_a_policy_starts_from_another_and_changes_what_it_says(tmp_path):
    base = {"name": "b", "retain": {"part": "window", "sink": 2, "budget": "6f"}}
    (tmp_path / "b.yaml").write_text("name: b\nretain: {part: window, sink: 2, budget: 6f}\n")
    (tmp_path / "c.yaml").write_text("name: c\nbase: b.yaml@9f\npositions: contiguous\n")
    made = policy_from_dict({"name": "x", "base": base, "retain": {"sink": 1}})
    whole = {"name": "x", "retain": {"part": "window", "sink": 1, "budget": "6f"}}
    assert made == policy_from_dict(whole)
    made = load_policy(str(tmp_path / "c.yaml"))
    window = {"part": "window", "sink": 2, "budget": "9f"}
    whole = {"name": "c", "retain": window, "positions": "contiguous"}
    assert made == policy_from_dict(whole)
    for name in presets():
        assert policy_from_dict({"name": name, "base": name}) == preset(name)
    with pytest.raises(ValueError, match=r"Did you mean 'h2o'"):
        policy_from_dict({"name": "x", "base": "h20"})


@pytest.mark.parametrize("budget", ["", "@9f"])
def test_a_policy_that_starts_from_itself_is_said_once(tmp_path, budget):
    (tmp_path / "d.yaml").write_text(f"name: d\nbase: d.yaml{budget}\n")
    (tmp_path / "e.yaml").write_text(f"name: e\nbase: f.yaml{budget}\n")
    (tmp_path / "f.yaml").write_text("name: f\nbase: e.yaml\n")
    for name, files in (("d", 1), ("e", 2)):
        with pytest.raises(ValueError, match="starts from itself") as refused:
            load_policy(str(tmp_path / f"{name}.yaml{budget}"))
        assert str(refused.value).count("In the policy file") == files
        assert "Start from a preset" in str(refused.value)
    data = {"name": "r"}
    data["base"] = data
    with pytest.raises(ValueError, match="'r' starts from itself"):
        policy_from_dict(data)


def test_a_base_is_a_file_by_the_end_of_its_path_only(tmp_path):
    (tmp_path / "my.yard").write_text("name: x\n")
    (tmp_path / "UP.YML").write_text("name: up\nretain: {part: window, budget: 6f}\n")
    with pytest.raises(ValueError, match=r"No policy 'my\.yard'"):
        policy_from_dict({"name": "x", "base": "my.yard"}, tmp_path)
    made = policy_from_dict({"name": "x", "base": "UP.YML@9f"}, tmp_path)
    assert made.retain.budget.amount == "9f"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base": 3}, ["starts from no policy", "base: 3", "Start from a preset"]),
        ({"base": []}, ["starts from no policy", "base: []"]),
        (
            {"base": "h2o", "precision": {"codec": "int4"}},
            ["'as-computed' has no settings", "'codec' was given", "`part: aged`"],
        ),
        ({"retain": {"size": 3}}, ["'everything' has no settings", "Leave it out"]),
    ],
)
def test_a_base_or_a_setting_that_makes_no_sense_is_said(values, words):
    with pytest.raises(ValueError) as refused:
        policy_from_dict({"name": "a"} | values)
    assert all(word in str(refused.value) for word in words)
    assert "Known: ." not in str(refused.value)


def test_a_budget_in_the_name_reaches_the_part():
    made = preset("top-attention@0.5")
    assert made.name == "top-attention@0.5"
    assert made.select.budget.amount == "0.5"
    assert made.retain.budget is None


def test_only_a_policy_with_a_budget_is_given_one():
    names = ("full", "dummy-forcing", "h2o", "random", "future-focused")
    assert [sized(name, "6f") for name in names] == [*names[:2], *(f"{n}@6f" for n in names[2:])]


def test_two_budgets_keep_their_ratio_or_are_both_given():
    both = [
        part.budget.amount
        for part in (preset("future-focused@10f").retain, preset("future-focused@10f").select)
    ]
    assert both == ["10f", "6f"]
    given = preset("future-focused@12f/3f")
    assert (given.retain.budget.amount, given.select.budget.amount) == ("12f", "3f")
    assert given.name == "future-focused@12f/3f"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("sliding-windw@9f", r"No policy 'sliding-windw'. Did you mean 'sliding-window'\?"),
        ("sliding-window@", "'' is not a budget"),
        ("sliding-window@nine", "'nine' is not a budget"),
        ("full@9f", "has no budget"),
        ("random@9f/6f", "has one budget"),
        ("future-focused@9f/6f/3f", "has two budgets"),
        ("nowhere.yaml", "No policy file"),
        ({"retain": "window"}, "without `name:`"),
        ({"name": "x", "retan": "window"}, r"'retan'. Did you mean 'retain'\?"),
        ({"name": "x", "retain": "windo"}, r"'windo'. Did you mean 'window'\?"),
        ({"name": "x", "retain": {"part": "window", "snk": 1}}, r"'snk'. Did you mean 'sink'\?"),
        (
            {"name": "x", "select": {"part": "random", "refresh": "now"}},
            "neither 'pass' nor 'chunk'",
        ),
        ({"name": "x", "precision": {"part": "aged", "codec": "int3"}}, "No codec 'int3'"),
        ({"name": "x", "bias": "mass"}, "use log_weight or none"),
    ],
)
def test_what_is_wrong_is_said(spec, text):
    with pytest.raises(ValueError, match=text):
        load_policy(spec)


@pytest.mark.parametrize(
    ("name", "frames", "fine"),
    [
        ("sliding-window@9f", 12, True),
        ("sliding-window@10f", 12, False),
        ("sink-window@2f", 12, False),
        ("sink-window@3f", 12, True),
        ("random@2f", 12, False),
        ("sliding-window@36t", 12, True),
        ("sliding-window@40t", 12, False),
        ("top-attention@0.5", 12, True),
    ],
)
def test_budgets_are_checked_against_the_rollout(name, frames, fine):
    if fine:
        preset(name).check(GEOMETRY, 3, frames)
    else:
        with pytest.raises(ValueError, match=r"must lie between \d+f and 9f"):
            preset(name).check(GEOMETRY, 3, frames)


def test_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nretain: {part: window, budget: 12f}\n"
        "select: {part: top-attention, budget: {part: uniform, amount: 6f}}\nprecision: aged\n"
    )
    made = load_policy(str(path))
    assert (made.name, made.retain.budget.amount, made.select.budget.amount) == (
        "mine",
        "12f",
        "6f",
    )


def test_every_part_says_what_it_is():
    discover()
    for kind, parts in PARTS.items():
        assert parts, kind
        for name, cls in parts.items():
            if cls.__module__.startswith("lightning_kv"):
                assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("), name


def test_one_frame_is_no_frames():
    for value, history, words in (
        (1.0, 12, "is 1 frame. In a rollout with at most 12 history frames it"),
        (2.0, 1, "is 2 frames. In a rollout with at most 1 history frame it"),
    ):
        with pytest.raises(ValueError, match=words):
            Amount(value, "f").check("mine", 3, history, 3, GEOMETRY)
