"""Budgets per head: the published table, the rule, and tables that cannot work."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from slow import passes, play, policy, session, sessions, stores, tape

from lightning_kv.policies.budget.importance import Importance, budgets
from lightning_kv.policies.registry import build_budget, policy_from_dict, policy_to_dict
from lightning_kv.policies.tables import HeadTable

PUBLISHED = "focused-forcing-wan-1.3b"
TOKENS = sessions.GEOMETRY.tokens
TABLE = ((0.0, 0.5, 1.0), (0.25, 0.75, 0.9))
WAN = replace(sessions.GEOMETRY, layers=30, heads=12)


def importance(**settings):
    return build_budget({"part": "importance", "amount": "6f", "importance": TABLE, **settings})


def found_by(part, most, least):
    """Frames of every head by the rule, a list per layer."""
    return [list(own) for own in budgets(part.importance.rows, part.gamma, most, least)]


@pytest.mark.parametrize(
    ("most", "counts"),
    [
        # The paper's 4 to 9 and 4 to 12 count the current chunk of 3 frames.
        (9, {4: 14, 5: 341, 6: 4, 9: 1}),
        (12, {4: 2, 5: 208, 6: 145, 7: 4, 12: 1}),
    ],
)
def test_the_published_table_gives_the_published_counts(most, counts):
    part = importance(amount=f"{most - 3}f", least="1f", importance=PUBLISHED)
    frames = budgets(part.importance.rows, part.gamma, most - 3, 1)
    assert [len(own) for own in frames] == [12] * 30
    assert Counter(n + 3 for own in frames for n in own) == counts
    policy(select={"part": "focused", "budget": part}).check(WAN, 3, 21)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_rule(data):
    """round(least + share ** gamma * (most - least)) of the share between all heads' extremes."""
    heads = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(-9, 9), min_size=heads, max_size=heads)
    table = data.draw(st.lists(row, min_size=1, max_size=3))
    least = data.draw(st.integers(1, 6))
    most = least + data.draw(st.integers(0, 8))
    gamma = data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.0]))
    part = Importance(f"{most}f", f"{least}f", gamma, tuple(tuple(map(float, x)) for x in table))
    flat = [x for own in table for x in own]
    low, high = min(flat), max(flat)
    for own, found in zip(table, found_by(part, most, least), strict=True):
        for x, frames in zip(own, found, strict=True):
            if low == high:
                assert frames == round((most + least) / 2)
                continue
            exact = least + ((x - low) / (high - low)) ** gamma * (most - least)
            assert least <= frames <= most and abs(frames - exact) <= 0.5 + 1e-9
            assert frames == least if x == low else True
            assert frames == most if x == high else True


@pytest.mark.parametrize(("least", "most", "both"), [(1, 6, 4), (1, 4, 2), (2, 5, 4), (3, 3, 3)])
def test_heads_that_matter_equally_get_the_middle(least, most, both):
    """Python rounds half a frame to the even neighbour."""
    part = importance(least=f"{least}f", amount=f"{most}f", importance=((0.3,) * 3,) * 2)
    assert found_by(part, most, least) == [[both] * 3] * 2


def test_every_head_keeps_its_frames():
    made = policy(retain={"part": "window", "budget": importance(gamma=1.0, amount="5f")})
    on = session(made)
    play(on, tape(passes(5, noisy=1)))
    for layer, expected in enumerate(([1, 3, 5], [2, 4, 5])):
        lengths = stores(on)[layer].memory.lengths
        assert lengths == tuple(n * TOKENS for n in expected)


def test_every_head_reads_its_frames():
    """Tokens and shares work as frames do; a share grows with the history."""
    read = {}
    for least, most in (("4t", "20t"), ("0.1", "0.5")):
        budget = importance(least=least, amount=most, gamma=1.0)
        on = session(policy(select={"part": "top-attention", "budget": budget}))
        play(on, tape(passes(5, noisy=1)))
        read[most] = on.costs[0].rows_read
    queries = 2 * TOKENS * 2
    per_chunk = {"20t": [[1, 3, 5], [2, 4, 5]]}
    rows = sum(min(n, f) for f in (2, 4, 6, 8) for own in per_chunk["20t"] for n in own)
    assert read["20t"] == queries * rows * TOKENS
    rows = 0
    for history in (2, 4, 6, 8):
        low, high = max(1, int(0.1 * history)), max(1, int(0.5 * history))
        for own in TABLE:
            rows += sum(min(history, round(low + x * (high - low))) for x in own)
    assert read["0.5"] == queries * rows * TOKENS


# -- tables of other models, and files -------------------------------------------------------


@pytest.mark.parametrize("kind", ["importance", "table"])
@pytest.mark.parametrize(
    "table",
    [
        ((0.1, 0.2, 0.3),),  # one layer of two
        ((0.1, 0.2), (0.3, 0.4)),  # two heads of three
        ((0.1, 0.2, 0.3), (0.3, 0.4)),
        ((0.1, 0.2, 0.3),) * 3,
    ],
)
def test_a_table_of_another_model_is_refused_when_the_policy_meets_it(kind, table):
    key = {"importance": "importance", "table": "shares"}[kind]
    budget = {"part": kind, "amount": "4f", key: table}
    for part in (
        {"retain": {"part": "window", "budget": budget}},
        {"select": {"part": "focused", "budget": budget}},
    ):
        made = policy_from_dict({"name": "x", **part})
        with pytest.raises(ValueError, match=r"another model.*2 layers of 3 heads"):
            made.check(sessions.GEOMETRY, 2, 12)
    fits = budget | {key: ((0.5, 1.0, 0.75),) * 2}
    policy_from_dict({"name": "x", "select": {"part": "focused", "budget": fits}}).check(
        sessions.GEOMETRY, 2, 12
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No head table at"),
        ("{", "no head table: JSONDecodeError"),
        ("{}", "no head table: KeyError"),
        ('{"importance": 3}', "no head table: TypeError"),
        ('{"importance": [0.1, 0.2]}', "no head table: TypeError"),
        ('{"importance": [[[], "b"]]}', "no head table: TypeError"),
        ("[1, 2]", "no head table: TypeError"),
    ],
)
def test_files_that_are_no_tables(tmp_path, text, said):
    path = tmp_path / "heads.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        HeadTable.read(path, "importance")
    assert str(path) in str(error.value)
    assert "Give a JSON file such as" in str(error.value)
    with pytest.raises(ValueError, match=said):
        importance(importance=str(path))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "heads.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no head table: UnicodeDecodeError"):
        HeadTable.read(path, "importance")


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="Give a JSON file such as"):
        HeadTable.read(tmp_path, "importance")


def test_a_policy_with_a_path_survives_plain_data(tmp_path):
    """What was read is in the policy: the file may go."""
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"importance": TABLE, "shares": TABLE}))
    for budget, key in (
        ({"part": "importance", "amount": "6f", "importance": str(path)}, "importance"),
        ({"part": "table", "amount": "6f", "shares": str(path)}, "shares"),
    ):
        made = policy_from_dict({"name": "x", "select": {"part": "focused", "budget": budget}})
        assert getattr(made.select.budget, key).rows == TABLE
        path.rename(tmp_path / "gone.json")
        plain = json.loads(json.dumps(policy_to_dict(made)))
        assert policy_from_dict(plain) == made
        assert hash(policy_from_dict(plain)) == hash(made)
        (tmp_path / "gone.json").rename(path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"least": "7f"}, "from 7f to 6f does not work"),
        ({"least": "4t"}, "from 4t to 6f does not work"),
        ({"amount": "2GiB", "least": "1GiB"}, "from 1GiB to 2GiB does not work"),
        ({"gamma": 0.0}, r"gamma=0\.0 .* above 0"),
        ({"gamma": -1.0}, r"gamma=-1\.0 .* above 0"),
        ({"importance": ()}, "needs `importance`: finite numbers"),
        ({"importance": ((0.1, float("nan")),)}, "needs `importance`: finite numbers"),
        ({"importance": ((0.1, float("inf")),)}, "needs `importance`: finite numbers"),
        ({"amount": "nine"}, "'nine' is not a budget"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        importance(**settings)


def test_a_flat_list_is_no_table():
    with pytest.raises(ValueError, match="a row per layer"):
        importance(importance=[0.1, 0.2])


@pytest.mark.parametrize(
    "shares", [(), (0.5, 1.0), ((0.5, float("nan"), 1.0),) * 2, ((0.5, -1.0, 1.0),) * 2]
)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"needs `shares`: finite numbers from 0"):
        build_budget({"part": "table", "amount": "4f", "shares": shares})


def test_less_than_what_is_protected_is_refused():
    """In the least important head too."""
    for budget in (importance(least="3f"), importance(least="12t", amount="24t")):
        retain = {"part": "heavy-hitters", "sink": 2, "budget": budget}
        with pytest.raises(ValueError, match=r"4 frames are protected .* least: 4f or more"):
            policy(retain=retain).check(sessions.GEOMETRY, 2, 12)
    retain = {"part": "heavy-hitters", "sink": 2, "budget": importance(least="4f")}
    policy(retain=retain).check(sessions.GEOMETRY, 2, 12)


@pytest.mark.parametrize("amount", ["6f", "24t"])
def test_a_table_that_gives_less_than_the_sink_is_refused(amount):
    """In any head of any layer; sink and newest chunk, where both are protected."""
    for part, fits, small in (("window", 0.5, 0.25), ("heavy-hitters", 0.8, 0.7)):
        for share in (fits, small):
            shares = ((1.5, 2.0, 1.25), (1.25, share, 1.5))
            budget = {"part": "table", "amount": amount, "shares": shares}
            made = policy(retain={"part": part, "sink": 3, "budget": budget})
            if share == fits:
                made.check(sessions.GEOMETRY, 2, 12)
                continue
            with pytest.raises(ValueError, match=r"smallest share .* are protected in every head"):
                made.check(sessions.GEOMETRY, 2, 12)


@pytest.mark.parametrize("least", ["2f", "8t"])
def test_an_importance_whose_least_is_below_the_sink_is_refused(least):
    budget = importance(least=least, amount="6f" if least == "2f" else "24t")
    made = policy(retain={"part": "window", "sink": 3, "budget": budget})
    with pytest.raises(ValueError, match=r"3 frames are protected .* least: 3f or more"):
        made.check(sessions.GEOMETRY, 2, 12)
    policy(retain={"part": "window", "sink": 2, "budget": budget}).check(sessions.GEOMETRY, 2, 12)


def test_the_frames_are_those_of_the_layer():
    part = importance(gamma=1.0, amount="5f")

    class Look:
        layer, geometry = 1, sessions.GEOMETRY

    assert part.allowed(Look()) == (2, 4, 5)
