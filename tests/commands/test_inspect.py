"""`lightning-kv inspect` of a scorer: what is in the file."""

from dataclasses import replace

import pytest

from lightning_kv.cli import main
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.testing.tapes import random_tape
from lightning_kv.utilities.files import checksum


def test_a_scorer_says_what_it_is(tmp_path, capsys):
    path, names = tmp_path / "mine.safetensors", [name for name in FEATURES if name != "trend"]
    made = Scorer.fresh("linear", random_tape().geometry, names, "recency", queries=7)
    about = {
        "model": {"name": "mine"},
        "data": {"prompts": ["a", "b", "c", "d"], "validation_prompts": ["e"]},
        "validation": {"table": {"own": {"regret@6": 0.123456}}},
    }
    replace(made, about=about).save(path)
    main(["inspect", str(path)])
    text = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    count = 6 * (28 + 1) + 28  # weights and biases of 2 x 3 heads, and the prior
    assert f"a student of kind linear, {count} numbers" in text
    assert checksum(path) in text
    assert "2 layers of 3 heads" in lines["heads it knows"]
    assert lines["features"].split()[1] == "28" and lines["left out"].split()[2] == "trend"
    assert lines["began as"].split()[2:] == ["-1", "age"]
    assert lines["queries that look"].split()[3] == "7"
    assert lines["model.name"].split()[1] == "mine"
    assert "4 (a, b, c, ...)" in lines["data.prompts"]
    assert lines["data.validation_prompts"].split()[1:] == ["1", "(e)"]
    assert lines["validation.table.own.regret@6"].split()[1] == "0.1235"


@pytest.mark.parametrize("content", [None, b"nothing of the kind"])
def test_what_is_no_scorer_is_said(tmp_path, capsys, content):
    path = tmp_path / "mine.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    text = capsys.readouterr().err
    assert ("cannot be read as a scorer" if content else "No scorer at") in text
    assert "lightning-kv distill" in text
