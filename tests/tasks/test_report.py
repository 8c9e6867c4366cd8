"""From a hand-made run directory to a summary and a page."""

import json

import pytest

from lightning_kv.runs.directory import RunDirectory
from lightning_kv.tasks.report import open_run, page_path, summary_of, write_report

ABOUT = {
    "reference": "full",
    "policies": {"full": {"name": "full"}, "less": {"name": "less"}},
    "metrics": {
        "recall": {"unit": "share", "higher_is_better": True, "recipe": "-", "undefined": "none"}
    },
    "run": {"prompts": 6, "frames": 12, "context_frames": 3, "seed": 0, "device": "cpu"},
    "model": {"name": "panorama", "chunk": 3, "layers": 6, "heads": 4},
    "videos": 0,
    "fps": 8,
}
COST = {
    "kv_bytes_mean": 10,
    "kv_rows_read": 5,
    "kv_rows_scored": 0,
    "kv_scored_fraction": 0.0,
    "seconds_per_chunk": [0.1],
}


def directory(path, values, about=ABOUT):
    """A run directory with a recall for each prompt under ``less``; ``full`` recalls all."""
    run = RunDirectory(path)
    run.open("mark", {"seed": 0}, about)
    for i, value in enumerate(values):
        for policy, recall, size in (("full", 1.0, 100), ("less", value, 40)):
            run.append(
                0,
                {
                    "policy": policy,
                    "key": f"k{i}",
                    "prompt": "dusk fast n4 left",
                    "metrics": {"recall": recall},
                    "curves": {"recall": [None, recall, recall]},
                    "cost": COST | {"kv_bytes_peak": size, "kv_read_fraction": size / 100},
                    "failure": None,
                },
            )
    return run


def test_the_summary_comes_from_the_directory_alone(tmp_path):
    values = [1.0, 0.5, 0.75, 0.25, 1.0, 1.0]
    run = directory(tmp_path / "run", values)
    found = summary_of(run)
    recall = found["policies"]["less"]["metrics"]["recall"]
    assert recall["mean"] == 0.75 and recall["n"] == 6
    assert recall["ci95"][0] < 0.75 < recall["ci95"][1]
    assert found["policies"]["less"]["cost"]["kv_bytes_peak"] == 40
    assert found["policies"]["less"]["curves"]["recall"]["mean"] == [None, 0.75, 0.75]
    assert (found["fingerprint"], found["reference"], found["run"]) == (
        "mark",
        "full",
        ABOUT["run"],
    )
    assert list(found["policies"]) == ["full", "less"]
    json.dumps(found, allow_nan=False)
    quick = summary_of(run, intervals=False)["policies"]["less"]["metrics"]["recall"]
    paired = recall.pop("paired")
    assert (paired["difference"], paired["n"]) == (-0.25, 6)
    assert quick == recall | {"ci95": None}, "the rest takes seconds"


def test_an_unfinished_run_has_a_summary_and_a_page(tmp_path):
    run = directory(tmp_path / "run", [1.0])
    found = summary_of(run)
    assert found["policies"]["less"]["metrics"]["recall"]["n"] == 1
    write_report(run.report, [run], [found])
    text = run.report.read_text()
    assert "1 of 6 prompts" in text and "less" in text


def test_a_page_about_two_runs_says_both_verdicts(tmp_path):
    runs = [
        directory(tmp_path / "first", [1.0] * 6),
        directory(tmp_path / "second", [0.0] * 6),
    ]
    path = tmp_path / "both.html"
    write_report(path, runs, [summary_of(run) for run in runs])
    text = path.read_text()
    assert "first: Run less" in text and "second: No policy keeps recall within 0.02" in text


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"No folder .*nowhere\. Give a run directory"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no run directory"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("-")
    with pytest.raises(ValueError, match="is no run directory"):
        open_run(tmp_path / "file")
    run = directory(tmp_path / "empty", [])
    for asked in (lambda: open_run(run.path), lambda: summary_of(run)):
        with pytest.raises(ValueError, match=r"has no records: nothing .*measured so far. Give"):
            asked()
    old = RunDirectory(tmp_path / "old")
    old.open("mark", {})
    with pytest.raises(ValueError, match="says too little about itself"):
        open_run(old.path)


def test_where_the_page_goes(tmp_path):
    run, other, out = tmp_path / "a", tmp_path / "b", tmp_path / "page.html"
    assert page_path([run], None, False) == run / "report.html"
    assert page_path([run, other], out, False) == out
    out.write_text("mine")
    assert page_path([run], out, True) == out


@pytest.mark.parametrize(
    ("runs", "out", "text"),
    [
        (["a", "b"], None, "--out report.html"),
        (["a", "a"], "new.html", "is given twice"),
        (["a", "b/../a"], "new.html", "is given twice"),
        (["a"], "there.html", "exists and would be lost"),
        (["a"], "page.pdf", "does not end in .html"),
        (["a"], "none/page.html", "No folder"),
    ],
)
def test_where_no_page_can_go(tmp_path, runs, out, text):
    (tmp_path / "there.html").write_text("mine")
    with pytest.raises(ValueError) as error:
        page_path([tmp_path / run for run in runs], out and tmp_path / out, False)
    assert text in str(error.value)
