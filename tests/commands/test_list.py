"""What `lightning-kv list` says of policies, parts and head tables."""

import json

import pytest

from lightning_kv.cli import main
from lightning_kv.policies.registry import presets
from lightning_kv.policies.tables import shipped


def listed(capsys, *words):
    """Rows as a program reads them."""
    main(["list", *words, "--json"])
    return {next(iter(row.values())): row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("name", [name for name, own in presets().items() if own.paper])
def test_a_method_with_a_paper_says_what_was_published(name):
    assert presets()[name].defaults
    assert len(presets()[name].defaults) <= 90


@pytest.mark.parametrize("name", presets())
def test_what_a_method_does_can_be_read_alone(name):
    assert presets()[name].about.startswith(("Keep ", "Drop ", "Read ", "As published for "))


def test_what_a_policy_needs_is_said(capsys):
    rows = listed(capsys, "policies")
    needs = {name: row["needs"] for name, row in rows.items()}
    reference = {name for name, text in needs.items() if text == "a reference rollout"}
    assert reference == {"oracle", "oracle-mass", "oracle-reads"}
    assert needs["world-kv"] == "the camera's pose (inputs)"
    assert needs["head-forcing"] == "head labels of the model (shipped for: panorama)"
    assert "longlive" in needs["forcing-kv"]
    for name in ("", "-longlive", "-rolling"):
        text = "numbers for heads of the model (shipped for: self-forcing)"
        assert needs[f"focused-forcing-paper{name}"] == text
    for name in ("distilled", "distilled-reads"):
        assert needs[name] == "a scorer of the model (shipped for: panorama)"
    assert needs["full"] == needs["h2o"] == "-"
    assert {name for name, row in rows.items() if row["deployable"] is False} == reference
    assert all(isinstance(row["deployable"], bool) for row in rows.values())
    assert rows["ada-kv"]["parts"] == "retain: snap-kv, budget: adaptive"


def test_on_the_screen_it_is_yes_or_no(capsys):
    main(["list", "policies", "h2o", "oracle"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [own[1] for own in lines if own[0] == "deployable"] == ["yes", "no"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("focused-forcing", ["made of select: focused.", "list parts focused`"]),
        ("ada-kv", ["retain: snap-kv, budget: adaptive", "list parts snap-kv adaptive`"]),
        ("full", ["retain: everything, select: everything", "list parts everything`"]),
    ],
)
def test_a_method_that_is_taken_for_a_part_is_said(capsys, name, words):
    with pytest.raises(SystemExit):
        main(["list", "parts", name])
    told = capsys.readouterr().err
    assert told.startswith(f"error: {name!r} is no part but a published method.")
    assert all(word in told for word in words)
    main(["list", "parts", *words[-1].removesuffix("`").split()[2:]])


def test_a_part_that_is_called_like_its_method_is_shown(capsys):
    assert listed(capsys, "parts", "snap-kv")["snap-kv"]["kind"] == "retain"


def test_a_file_that_is_found_for_the_model_is_auto(capsys):
    rows = listed(capsys, "parts", "calibrated", "forcing-kv", "importance")
    for part, setting, word in (
        ("calibrated", "heads", "auto"),
        ("forcing-kv", "labels", "auto"),
        ("importance", "importance", "needed"),
    ):
        assert rows[part]["settings"][setting].endswith(f"[{word}]")


def test_the_shipped_head_tables_are_shown(capsys):
    rows = listed(capsys, "heads")
    assert list(rows) == list(shipped())
    assert rows["pyramid-forcing-self-forcing"]["heads"] == (
        "30 layers of 12: 172 anchor, 156 wave, 32 veil"
    )
    numbers = rows["focused-forcing-wan-1.3b"]
    assert numbers["heads"] == "30 layers of 12: from 0.17009 to 0.30059"
    assert numbers["models"] == "self-forcing"
    assert all(list(row) == list(numbers) and all(row.values()) for row in rows.values())
    main(["list", "heads", "forcing-kv-panorama"])
    shown = capsys.readouterr().out
    assert "forcing-kv-longlive" not in shown
    assert "method    forcing-kv" in shown
    with pytest.raises(SystemExit):
        main(["list", "heads", "forcing-kv"])
    assert "Did you mean 'forcing-kv-" in capsys.readouterr().err
