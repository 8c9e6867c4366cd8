"""Names, orders and rankings of what a report compares."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.report.entries import (
    entries_of,
    families,
    headline,
    main_metric,
    main_metrics,
    run_names,
    with_values,
    without_values,
)
from lightning_kv.report.prompts import extremes, finished, median, ranked

RECALL = {"full": [1.0, 1.0, 1.0], "a@9f": [0.2, 0.6, 0.4], "b": [0.3, 0.9, 0.1]}
PROMPTS = ["first", "second", "third"]


def test_policies_of_two_runs_are_told_apart_only_where_they_must(tmp_path, make_run) -> None:
    one = make_run(tmp_path / "one", RECALL, PROMPTS)
    two = make_run(tmp_path / "two", {"full": [1.0], "c@6f": [0.5], "b@3f": [0.4]}, ["x"])
    assert [entry.label for entry in entries_of([one])] == ["full", "a@9f", "b"]
    both = entries_of([one, two])
    assert [entry.label for entry in both] == [
        *("one/full", "a@9f", "one/b"),
        *("two/full", "c@6f", "two/b@3f"),
    ]
    assert [entry.is_reference for entry in both] == [True, False, False, True, False, False]
    assert [entry.run for entry in both] == ["one"] * 3 + ["two"] * 3
    assert [e.mean("recall") for e in both] == pytest.approx([1.0, 0.4, 1.3 / 3, 1.0, 0.5, 0.4])
    assert {entry.family for entry in both} == {
        *("one/full", "two/full", "a", "one/b", "two/b", "c"),
    }, "a family is of one run"


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=5))
def test_run_names_are_the_shortest_that_differ(parts: list[list[str]]) -> None:
    paths = [Path("/", *part) for part in parts]
    names = run_names(paths)
    for path, name in zip(paths, names, strict=True):
        assert path.as_posix().endswith(name)
    assert len(set(names)) == len(set(paths))
    length = max(len(Path(name).parts) for name in names)
    if length > 1:
        shorter = {path.parts[-length + 1 :] for path in paths}
        assert len(shorter) < len(set(paths)), "one part less would not do"


def test_budgets_of_a_family_are_in_order(tmp_path, make_run) -> None:
    names = ["full", "w@15f", "w@6f", "top", "w@9f", "w@0.25", "w@.5"]
    run = make_run(tmp_path, {name: [0.5] for name in names}, ["x"])
    groups = families(entries_of([run]))
    assert {name: [e.budget for e in group] for name, group in groups.items()} == {
        "w": ["0.25", ".5", "6f", "9f", "15f"],
        "top": [""],
    }


def test_the_main_metric_is_recall_then_psnr_then_any(tmp_path, make_run) -> None:
    run = make_run(tmp_path / "a", RECALL, PROMPTS)
    assert (main_metrics(entries_of([run])), main_metric(entries_of([run]))) == (
        ["recall", "psnr"],
        "recall",
    )
    lost = make_run(tmp_path / "b", {"full": [1.0], "a": [None]}, ["x"])
    assert main_metric(entries_of([lost])) == "psnr"
    for policy in lost.summary["policies"].values():
        policy["metrics"]["psnr"]["mean"] = None
    assert main_metric(entries_of([lost])) == "ruler_error"
    assert main_metrics(entries_of([lost])) == ["ruler_error"]
    for policy in lost.summary["policies"].values():
        policy["metrics"]["ruler_error"]["mean"] = None
    assert (main_metrics(entries_of([lost])), main_metric(entries_of([lost]))) == ([], None)


def test_neutral_metrics_and_those_of_sets_rank_nothing(tmp_path, make_run, add_metrics) -> None:
    run = add_metrics(make_run(tmp_path, {"full": [None], "a": [None]}, ["x"]))
    entries = entries_of([run])
    assert (main_metrics(entries), main_metric(entries)) == (["psnr"], "psnr")
    assert headline(entries) == ["psnr", "fvd/panorama-encoder"]
    assert without_values(entries) == {
        "recall": "no clip gave one",
        "fvd/i3d": "unavailable: no <weights> here",
    }
    for policy in run.summary["policies"].values():
        for name in ("psnr", "ruler_error", *(f"quality_{i}" for i in range(16))):
            policy["metrics"][name]["mean"] = None
    assert main_metrics(entries) == ["brightness"]
    assert main_metric(entries) is None
    assert with_values(entries) == ["brightness", "fvd/panorama-encoder"]


def test_where_only_fidelity_is_known_all_of_it_is_main(tmp_path, make_run) -> None:
    run = make_run(tmp_path, {"full": [None], "a": [None]}, ["x"])
    for policy in run.summary["policies"].values():
        for name in ("ssim", "lpips/alex", "psnr_mean"):
            policy["metrics"][name] = dict(policy["metrics"]["psnr"])
    assert main_metrics(entries_of([run])) == ["psnr", "ssim", "lpips/alex"]


def test_prompts_are_ranked_by_the_mean_over_the_policies(tmp_path, make_run) -> None:
    run = make_run(tmp_path, RECALL, PROMPTS)
    records = run.directory.records()
    found = ranked(records, run.summary, "recall", {"k0", "k1", "k2"})
    assert [prompt.key for prompt in found] == ["k1", "k0", "k2"], "0.75, 0.25, 0.25: then by key"
    assert [prompt.score for prompt in found] == pytest.approx([0.75, 0.25, 0.25])
    assert found[0].prompt == "second"
    assert found[0].values == {"full": 1.0, "a@9f": 0.6, "b": 0.9}
    assert [p.key for p in ranked(records, run.summary, "recall", {"k0", "k2"})] == ["k0", "k2"]
    for policy in run.summary["policies"].values():
        policy["metrics"]["recall"]["higher_is_better"] = False
    assert [p.key for p in ranked(records, run.summary, "recall", {"k1", "k2"})] == ["k2", "k1"]
    assert [p.key for p in ranked(records, run.summary, None, {"k2", "k1"})] == ["k1", "k2"]


def test_a_prompt_that_not_every_policy_has_finished_is_not_ranked(tmp_path, make_run) -> None:
    recall = {"full": [1.0, 1.0, 1.0], "a": [0.1, 0.2, 0.3], "b": [0.5, None], "never": []}
    run = make_run(tmp_path, recall, PROMPTS, total=5)
    records = run.directory.records()
    found = ranked(records, run.summary, "recall", {"k0", "k1", "k2"})
    assert [(p.key, p.score) for p in found] == [("k0", pytest.approx(0.3))]
    assert found[0].values["never"] is None
    assert finished(records, run.summary) == 0
    del run.summary["policies"]["never"]
    assert finished(records, run.summary) == 2


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {}),
        (1, {"only": 0}),
        (2, {"best": 0, "worst": 1}),
        (3, {"best": 0, "median": 1, "worst": 2}),
        (4, {"best": 0, "median": 1, "worst": 3}),
        (7, {"best": 0, "median": 3, "worst": 6}),
    ],
)
def test_the_best_the_median_and_the_worst(count: int, expected: dict[str, int]) -> None:
    prompts = list(range(count))
    assert extremes(prompts) == expected
    if count:
        assert median(prompts) == (count - 1) // 2
