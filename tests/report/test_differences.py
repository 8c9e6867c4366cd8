"""What is said about a difference to the reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_kv.report.differences import differences, family_words
from lightning_kv.report.entries import entries_of


@pytest.mark.parametrize(
    ("metric", "change", "p", "says"),
    [
        ("recall", +0.5, 0.01, "better"),
        ("recall", -0.5, 0.01, "worse"),
        ("ruler_error", +0.5, 0.01, "worse"),
        ("ruler_error", -0.5, 0.01, "better"),
        ("ruler_error", +0.5, 0.05, "worse"),
        ("ruler_error", +0.5, 0.051, ""),
        ("ruler_error", +0.5, None, ""),
    ],
)
def test_better_is_what_the_metric_calls_better(
    tmp_path: Path, make_run, metric: str, change: float, p: float | None, says: str
) -> None:
    run = make_run(tmp_path, {"full": [0.5], "a": [0.5]}, ["x"])
    test = {"difference": change, "ci95": None, "p": p, "p_holm": p, "d_z": None, "n": 6}
    run.summary["policies"]["a"]["metrics"][metric]["paired"] = test
    (found,) = differences(entries_of([run]))
    assert (found.label, found.metric, found.says) == ("a", metric, says)
    assert found.differs == bool(says)
    for policy in run.summary["policies"].values():
        policy["metrics"][metric]["higher_is_better"] = None
    (found,) = differences(entries_of([run]))
    assert found.says == "", "neither way is better"


@pytest.mark.parametrize(("prompts", "few"), [(6, True), (7, False), (8, False)])
def test_too_few_prompts_for_any_to_be_sure(prompts: int, few: bool) -> None:
    family = {"tests": 3, "correction": "Holm", "level": 0.05}
    family |= {"prompts": prompts, "prompts_needed": 7}
    text = family_words({"family": family, "reference": "full"})
    assert ("none can be sure with 6 prompts: so many tests take 7 prompts or more." in text) == few
