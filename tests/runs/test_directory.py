"""Records survive a crash at any byte, and a directory never mixes two runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.runs.directory import RunDirectory, fingerprint

DESCRIBED = {"model": "panorama", "run": {"frames": 72, "seed": 0}, "policies": ["full", "random"]}
ABOUT = {"reference": "full", "policies": {"full": {"retain": "everything"}}, "fps": 8}


def a_record(policy: str = "full", key: str = "k0", **changes: object) -> dict:
    record = {
        "policy": policy,
        "key": key,
        "prompt": "dusk fast n13 left",
        "metrics": {"psnr": 31.25, "recall": None},
        "curves": {"psnr": [None, 30.5, 32.0]},
        "cost": {
            "kv_bytes_peak": 1024,
            "kv_bytes_mean": 512.0,
            "kv_rows_read": 10,
            "kv_rows_scored": 0,
            "kv_read_fraction": 0.5,
            "kv_scored_fraction": 0.0,
            "seconds_per_chunk": [0.04, 0.05],
        },
    }
    return record | changes


def opened(path: Path, described: dict = DESCRIBED) -> RunDirectory:
    run = RunDirectory(path)
    run.open(fingerprint(described), described, ABOUT)
    return run


def contents(path: Path) -> dict[str, bytes | None]:
    """Everything below a path, to show that nothing was written."""
    found = {str(p.relative_to(path)): p for p in path.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in found.items()}


def test_a_line_is_plain_json_in_the_file_of_its_rank(tmp_path: Path) -> None:
    run = opened(tmp_path / "a" / "b")
    run.append(3, a_record())
    lines = (tmp_path / "a" / "b" / "records" / "rank-00003.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"schema": 1, "rank": 3, **a_record()}]
    assert {p.name for p in (tmp_path / "a" / "b").iterdir() if p.is_dir()} == {
        "records",
        "videos",
        "traces",
    }
    assert json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == {
        "schema": 1,
        "fingerprint": fingerprint(DESCRIBED),
        "described": DESCRIBED,
        "about": ABOUT,
    }


def test_the_whole_line_is_in_the_file_when_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "run")
    seen: list[bytes] = []
    file = tmp_path / "run" / "records" / "rank-00000.jsonl"
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(file.read_bytes()))
    run.append(0, a_record())
    assert len(seen) == 1
    assert seen[0].endswith(b"\n")
    assert json.loads(seen[0])["key"] == "k0"


numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
records = st.builds(
    lambda policy, metrics, curve: a_record(policy, metrics=metrics, curves={"m": curve}),
    st.text(max_size=8),
    st.dictionaries(st.text(max_size=5), numbers, max_size=3),
    st.lists(numbers, max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_a_cut_at_any_byte_costs_the_last_record_only(
    lines: list[dict], data: st.DataObject
) -> None:
    lines = [line | {"key": f"k{index}"} for index, line in enumerate(lines)]
    with tempfile.TemporaryDirectory() as folder:
        run = opened(Path(folder))
        for line in lines:
            run.append(0, line)
        expected = [{"schema": 1, **line, "rank": 0} for line in lines]
        assert run.records() == expected
        file = Path(folder) / "records" / "rank-00000.jsonl"
        whole = file.read_bytes()
        last = whole.rindex(b"\n", 0, len(whole) - 1) + 1 if len(lines) > 1 else 0
        cut = data.draw(st.integers(last, len(whole) - 1))
        file.write_bytes(whole[:cut])
        assert run.records() == expected[:-1]
        assert file.read_bytes() == whole[:cut], "reading must not change the file"
        run.append(0, lines[-1])
        assert file.read_bytes() == whole


def test_a_half_written_line_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = opened(tmp_path)
    run.append(0, a_record())
    assert run.records()
    assert not caplog.records
    file = tmp_path / "records" / "rank-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    assert run.records() == []
    assert "rank-00000.jsonl ends in a half-written record" in caplog.text


def test_a_damaged_line_inside_a_file_is_an_error(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.append(0, a_record())
    file = tmp_path / "records" / "rank-00000.jsonl"
    for line in (b'{"schema": 1, "pol\n', b"[]\n", file.read_bytes().replace(b": 1,", b": 2,", 1)):
        file.write_bytes(line)
        with pytest.raises(ValueError, match=r"rank-00000\.jsonl, line 1 .* remove the line"):
            run.records()


def test_the_same_run_can_be_opened_again_by_other_ranks(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for rank in range(4):
        first.append(rank, a_record(key=f"k{rank}"))
    again = opened(tmp_path, {"policies": ("full", "random"), **DESCRIBED})
    again.append(0, a_record(key="k4"))
    assert {record["key"] for record in again.records()} == {f"k{i}" for i in range(5)}


def test_another_run_is_refused_and_the_differences_are_named(tmp_path: Path) -> None:
    opened(tmp_path).append(0, a_record())
    before = contents(tmp_path)
    other = deepcopy(DESCRIBED)
    other["run"]["frames"] = 48
    other["run"]["threads"] = 2
    del other["policies"][1]
    with pytest.raises(ValueError) as error:
        opened(tmp_path, other)
    text = str(error.value)
    assert "run.frames (there 72, asked 48)" in text
    assert "run.threads (there 'nothing', asked 2)" in text
    assert "policies.1 (there 'random', asked 'nothing')" in text
    assert "seed" not in text
    assert "another directory" in text
    assert contents(tmp_path) == before


def test_what_a_run_says_about_itself_is_read_back_and_never_compared(tmp_path: Path) -> None:
    run = opened(tmp_path)
    assert RunDirectory(tmp_path).about() == ABOUT
    run.open(fingerprint(DESCRIBED), DESCRIBED, {"reference": "another", "fps": 12})
    assert run.about() == ABOUT, "kept from the first time"
    assert run.held()["fingerprint"] == fingerprint(DESCRIBED)


@pytest.mark.parametrize("content", [None, "[1, 2]", "{", '{"schema": 1}'])
def test_there_is_nothing_to_say_about_what_is_no_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"is no run directory.*run\.json.*one that `evaluate`"):
        RunDirectory(tmp_path).about()


def test_a_run_of_an_older_version_cannot_be_reported(tmp_path: Path) -> None:
    old = {"schema": 1, "fingerprint": fingerprint(DESCRIBED), "described": DESCRIBED}
    (tmp_path / "run.json").write_text(json.dumps(old))
    opened(tmp_path).append(0, a_record())
    with pytest.raises(ValueError, match=r"no 'about'.*Evaluate again"):
        RunDirectory(tmp_path).about()


def test_a_fingerprint_that_differs_alone_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ValueError, match="fingerprint"):
        RunDirectory(tmp_path).open("0" * 64, DESCRIBED, ABOUT)


@pytest.mark.parametrize("name", ["notes.txt", "run.json"])
def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[1, 2]")
    with pytest.raises(ValueError, match="no run directory"):
        opened(tmp_path)
    assert contents(tmp_path) == {name: b"[1, 2]"}


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="no run directory"):
        opened(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_refused_by_name(tmp_path: Path, wild: float) -> None:
    run = opened(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"curves\.psnr\.1.*None"):
        run.append(0, a_record(curves={"psnr": [1.0, wild]}))
    assert contents(tmp_path) == before


def test_an_incomplete_record_is_refused(tmp_path: Path) -> None:
    record = a_record()
    del record["cost"]
    with pytest.raises(ValueError, match=r"lacks \['cost'\]"):
        opened(tmp_path).append(0, record)


def test_a_clip_measured_twice_counts_once(tmp_path: Path) -> None:
    run = opened(tmp_path)
    later = a_record(metrics={"psnr": 31.25 * (1 + 1e-9), "recall": None})
    later["cost"] = later["cost"] | {"seconds_per_chunk": [9.0]}
    run.append(0, a_record())
    run.append(1, later)
    assert run.records() == [{"schema": 1, **a_record(), "rank": 0}]


@pytest.mark.parametrize("value", [31.26, None])
def test_two_records_that_disagree_are_an_error(tmp_path: Path, value: float | None) -> None:
    run = opened(tmp_path)
    run.append(0, a_record())
    run.append(1, a_record(metrics={"psnr": value, "recall": None}))
    with pytest.raises(ValueError, match=r"'full' for 'k0' disagree in metrics\.psnr"):
        run.records()


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 4))), st.sets(st.sampled_from("abc"))
)
def test_finished_means_every_policy(done: set[tuple[str, int]], policies: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = opened(Path(folder))
        for policy, key in done:
            run.append(key % 2, a_record(policy, str(key)))
        slow = set()
        for key in {key for _, key in done}:
            missing = [policy for policy in policies if (policy, key) not in done]
            if not missing:
                slow.add(str(key))
        assert run.finished(list(policies)) == slow


def test_fingerprint_is_the_hash_of_canonical_json() -> None:
    canonical = b'{"a":[1,2],"b":{"x":null,"y":0.5}}'
    expected = hashlib.sha256(canonical).hexdigest()
    assert fingerprint({"b": {"y": 0.5, "x": None}, "a": (1, 2)}) == expected
    assert fingerprint({"b": {"y": 0.5, "x": 1}, "a": (1, 2)}) != expected
