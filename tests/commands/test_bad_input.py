"""What is wrong with files and places is said by every command: three parts, and no traceback."""

import gzip
import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest

from lightning_kv.cli import main
from lightning_kv.runs.video import write_mp4

SMALL = ["--prompts", "1", "--frames", "18", "--context_frames", "12", "--metrics", "recall"]
SETS = ["--metrics", "fvd/panorama-encoder", "--videos", "0", "--accelerator", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder beside one with two videos."""
    for name in ("good", "alike"):
        (tmp_path / name).mkdir()
        for key in "ab":
            write_mp4(tmp_path / name / f"{key}.mp4", np.zeros((8, 32, 32, 3), np.uint8), 8)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def refused(capsys, words, code=2):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    text, error = capsys.readouterr()
    said = text if code == 1 else error[error.index("error: ") :]
    assert stop.value.code == code and "Traceback" not in error
    assert said.count("\n") == 1 and len(said) < 1000
    assert len(re.findall(r"\w\S*\.(?=\s)", said)) in (2, 3) and not re.search(r"\.\.\s", said)
    return said


def tar_of(name, content):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return made.getvalue()


TARS = {
    "a gzip bomb": (gzip.compress(bytes(2**26), 9), "Given gzip"),
    "a page of HTML": (b"<!DOCTYPE html><title>404</title>" + bytes(2000), "Given HTML"),
    "nothing": (b"", "Given nothing"),
    "a way out": (tar_of("../x.mp4", b"x"), "a name that leads out of its folder"),
}
READERS = {
    "evaluate": ["evaluate", "--data.shards", "SET", *SMALL, "--accelerator", "cpu"],
    "real": ["compare", "../good", "../alike", "--real", "SET", *SETS],
    "compare": ["compare", "../good", "SET", *SETS],
    "check": ["shards", "check", "SET"],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", TARS)
def test_a_tar_that_is_none(here, capsys, kind, reader):
    (here / "set").mkdir()
    content, said = TARS[kind]
    (here / "set" / "set-000000.tar").write_bytes(content)
    shard = {"file": "set-000000.tar", "samples": 1, "bytes": len(content)}
    shard["sha256"] = hashlib.sha256(content).hexdigest()
    index = {"schema": 1, "name": "set", "samples": 1, "shards": [shard]}
    (here / "set" / "index.json").write_text(json.dumps(index))
    before = sorted(here.rglob("*"))
    words = ["../set" if word == "SET" else word for word in READERS[reader]]
    out = [] if reader == "check" else ["--out", "run"]
    assert said in refused(capsys, [*words, *out], 1 if reader == "check" else 2)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", *SMALL, "--accelerator", "cpu"],
        ["compare", "../good", "../alike", *SETS],
        ["shards", "make", "../good"],
        ["pretrain-encoder"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_a_folder_is_due(here, capsys, words, place):
    (here / "here" / "file").write_text("mine")
    error = refused(capsys, [*words, "--out", place])
    assert "file" in error and (here / "here" / "file").read_text() == "mine"


def test_no_video_that_can_be_used(here, capsys):
    (here / "real").mkdir()
    words = ["compare", "../good", "../alike", "--real", "../real", *SETS, "--out", "run"]
    assert "Given none of .mp4" in refused(capsys, words)
    (here / "real" / "a.mp4").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith("None of 1 real videos can be used. real a: Cannot read ../real/a.mp4")
    assert error.endswith("at most. Give others to --real.\n")


def test_a_table_of_one_long_line(here, capsys):
    (here / "pairs.csv").write_text("a" * 100_000)
    words = ["compare", "--pairs", "../pairs.csv", *SETS, "--out", "run"]
    assert "are not those of pairs" in refused(capsys, words)
