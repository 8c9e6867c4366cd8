"""Policies that cannot work: each is refused with what is wrong, what was given, what would work.

Whatever is generic is tried on all published methods, so that a new one is held to it too.
"""

import dataclasses
import json
import re

import pytest

from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.part import PARTS
from lightning_kv.policies.registry import discover, load_policy, preset, presets
from lightning_kv.policies.tables import HeadTable
from lightning_kv.testing import chunked, random_tape, rolling, without_commits

discover()
TAPE = random_tape(chunked([3] * 8))
GEOMETRY, FRAMES = TAPE.geometry, TAPE.frames


def checked(spec):
    """A policy, held against a model of 2 layers of 3 heads with chunks of 3 of 24 frames."""
    made = load_policy(spec)
    made.check(GEOMETRY, 3, FRAMES)
    return made


def suited(without_tables=False):
    """Names of methods that need no head table, or scorer, of a model that this one is not."""
    for name in presets(without_tables=without_tables):
        try:
            preset(name).check(GEOMETRY, 3, FRAMES)
        except ValueError as error:
            assert re.search("head|scorer", str(error)), error
        else:
            yield name


def three_parts(error):
    """An error says more than one sentence, and ends one with a full stop."""
    sentences = re.split(r"(?<=[.?!])\s", str(error.value).strip())
    assert len(sentences) > 1, f"no way out: {error.value}"


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_an_unknown_name_names_the_nearest_and_all(name):
    """A letter is missing in the middle."""
    middle = len(name) // 2
    wrong = name[:middle] + name[middle + 1 :]
    with pytest.raises(ValueError, match=f"No policy '{wrong}'") as error:
        load_policy(f"{wrong}@9f" if name != "full" else wrong)
    near = re.search(r"Did you mean '(.+)'\?", str(error.value))
    known = str(error.value).partition("Known: ")[2].rstrip(".").split(", ")
    assert near and near[1] in known and {name, *presets()} <= set(known)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"retain": "focused"}, r"'focused' is given as the retain part, and it is a select part"),
        ({"positions": "window"}, r"it is a retain part\. Write it under `retain:`, and under `po"),
        ({"retain": {"part": "window", "budget": {"part": "sink"}}}, r"No budget part 'sink'"),
        (
            {"retain": {"part": "window", "budget": {"part": "int8"}}},
            r"method\. .*'aged'",
        ),
        ({"retain": "h2o"}, r"a published method\. It is made of .*'heavy-hitters'.*: write these"),
        ({"retain": "pyramid"}, r"it is a budget part\. Write it under `budget:`"),
        ({"retain": {"part": "snap-kv", "poool": 3}}, r"Did you mean 'pool'\? Known: .*queries"),
    ],
)
def test_a_name_in_the_wrong_place(spec, said):
    with pytest.raises(ValueError, match=said) as error:
        load_policy({"name": "x", **spec})
    three_parts(error)


# -- budgets ---------------------------------------------------------------------------------


def protecting(kind):
    """Names of methods that protect more than a frame of memory, or of what they read."""
    for name in suited():
        part = getattr(preset(name), kind)
        if part.limited and part.budget is not None and part.smallest(3) > 1:
            yield name


@pytest.mark.parametrize("name", list(protecting("retain")))
def test_a_memory_below_what_a_method_protects(name):
    least = preset(name).retain.smallest(3)
    with pytest.raises(ValueError, match=f"must lie between {least}f and") as error:
        checked(f"{name}@{least - 1}f")
    assert repr(f"{name}@{least - 1}f") in str(error.value)
    three_parts(error)


@pytest.mark.parametrize("name", list(protecting("select")))
def test_reads_below_what_a_method_protects(name):
    made = preset(name)
    least = made.select.smallest(3)
    memory = f"{max(9, made.retain.smallest(3))}f/" if made.retain.budget else ""
    with pytest.raises(ValueError, match=f"must lie between {least}f and"):
        checked(f"{name}@{memory}{least - 1}f")


@pytest.mark.parametrize("name", list(suited()))
def test_a_budget_beyond_the_rollout(name):
    """Asked for by name it is refused; a preset's own is not."""
    made = preset(name)
    made.check(GEOMETRY, 3, 6)
    parts = [part for part in (made.retain, made.select) if part.budget is not None]
    if not parts or any(Amount.parse(part.budget.amount).unit != "f" for part in parts):
        with pytest.raises(ValueError, match=r"has no budget|must lie between"):
            checked(f"{name}@40f")
        return
    with pytest.raises(ValueError, match=r"must lie between \d+f and 21f"):
        checked(f"{name}@40f")


# -- tables ----------------------------------------------------------------------------------


def words(cls, setting):
    """Two different values that a table may hold: of those shipped of a method, or numbers."""
    own = getattr(cls, setting)
    if own.file == "auto":
        own = getattr(cls(), setting)
    return own.values[:: len(own.values) - 1] if own.values else (0, 1)


def tables():
    """Every part with a table of one number per head, and the setting it is read from."""
    for kind, own in PARTS.items():
        for name, cls in sorted(own.items()):
            for field in dataclasses.fields(cls):
                if isinstance(field.default, HeadTable):
                    yield kind, name, field.name, words(cls, field.name)


@pytest.mark.parametrize(("kind", "name", "setting", "two"), list(tables()))
def test_a_head_table_of_another_model_or_shape(kind, name, setting, two, tmp_path):
    path = tmp_path / "heads.json"
    low, high = two
    path.write_text(json.dumps({setting: [[low, high], [high, low], [high, high]]}))
    part = {"part": name, setting: str(path)}
    own = {"retain": {"part": "window", "budget": part}} if kind == "budget" else {kind: part}
    with pytest.raises(ValueError, match=r"made for another model|made for a") as error:
        checked({"name": "x", **own})
    for word in ("heads.json", "3 rows of 2 heads", "2 layers of 3 heads"):
        assert word in str(error.value)
    path.write_text(json.dumps({"other": [[0.2]]}))
    with pytest.raises(ValueError, match=r"heads\.json' is no head table: KeyError.*Give a JSON"):
        checked({"name": "x", **own})


# -- samplers --------------------------------------------------------------------------------


BARE = {
    "chunks": random_tape(without_commits(chunked([3] * 6, noisy=1)), grid=(1, 2)),
    "rolling": random_tape(without_commits(rolling(2, 14, 2)), grid=(1, 2)),
}


@pytest.mark.parametrize("tape", BARE)
@pytest.mark.parametrize("name", list(suited(without_tables=True)))
@pytest.mark.thinned(4)
def test_without_a_commit_pass_a_method_works_or_names_what_it_lacks(name, tape):
    made = preset(name)
    made = made.budgeted("4f") if _one_budget(made) else made
    try:
        BARE[tape].play(made)
    except ValueError as error:
        kinds = [f"The {part.kind} part {part.name!r}" for part in made.parts]
        assert any(kind in str(error) for kind in kinds), error
        assert "Use a sampler that" in str(error), error


def _one_budget(made):
    parts = [part for part in (made.retain, made.select) if part.budget is not None]
    return len(parts) == 1 and parts[0].smallest(3) <= 4


# -- pairs -----------------------------------------------------------------------------------

ADAPTIVE = {"part": "adaptive", "amount": "6f"}
PAIRS = {
    "merged twice": (
        {"retain": {"part": "future", "budget": "6f", "merge": "hyperplane"}, "bias": "log_weight"},
        r"merge: hyperplane does not go with bias: log_weight, .* twice\. Use bias: none",
    ),
    "merged and not counted": (
        {"retain": {"part": "future", "budget": "6f", "merge": "weight"}},
        r"merge: weight does not go with bias: none, .* not at all\. Use bias: log_weight",
    ),
    "ranks are no masses": (
        {"retain": {"part": "oracle", "budget": ADAPTIVE}},
        r"'adaptive' compares scores .* the retain part 'oracle' .* Give it the budget part .*"
        r"uniform",
    ),
    "standard scores are no masses": (
        {"retain": {"part": "tri-attention", "mode": "layer_perhead", "budget": ADAPTIVE}},
        r"'adaptive' compares scores .* the retain part 'tri-attention'",
    ),
    "reads are chosen layer by layer": (
        {"select": {"part": "top-attention", "budget": {**ADAPTIVE, "over": "model"}}},
        r"'adaptive' divides among the heads of all layers, and the select part 'top-attention' .*"
        r"Use over: layer",
    ),
    "so is this memory": (
        {"retain": {"part": "future", "budget": {**ADAPTIVE, "over": "model"}}},
        r"and the retain part 'future' .* decides layer by layer\. Use over: layer",
    ),
    "one ranking, several amounts": (
        {"retain": {"part": "tri-attention", "budget": {"part": "pyramid", "amount": "6f"}}},
        r"'tri-attention' .* 'pyramid' .* or mode: layer_perhead",
    ),
    "a pyramid below the sink": (
        {"retain": {"part": "snap-kv", "sink": 2, "budget": {"part": "pyramid", "amount": "9f"}}},
        r"The last layer of a pyramid of 9f gets 3 frames, but 5 are protected .* least: 5f",
    ),
    "a budget for a part that takes none": (
        {"retain": {"part": "dummy-forcing", "budget": "9f"}},
        r"'dummy-forcing' takes no budget, and 9f was given\. Leave it out",
    ),
    "bytes for reads": (
        {"select": {"part": "top-attention", "budget": "2MiB"}},
        r"is bytes, but reading less frees none\. Give frames, tokens or a share, or put it on",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_parts_that_contradict_each_other(case):
    spec, said = PAIRS[case]
    with pytest.raises(ValueError, match=said) as error:
        checked({"name": "x", **spec})
    three_parts(error)
