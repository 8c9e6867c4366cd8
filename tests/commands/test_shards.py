"""`lightning-kv shards`: what is typed, and what it says."""

import numpy as np
import pytest

from lightning_kv.cli import main
from lightning_kv.data.shards import PromptShards, read_index
from lightning_kv.runs.video import write_mp4


def typed(*words):
    """Exit code of a command."""
    try:
        main(["shards", *map(str, words)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_prompts_go_in_and_a_damaged_set_is_said(tmp_path, capsys):
    source, out = tmp_path / "p.txt", tmp_path / "set"
    source.write_text("a red fox\n\na blue cat\nnoon\n")
    assert typed("make", source, "-o", out, "--per-shard", 2) == 0
    index = read_index(out)
    assert [sample.prompt for sample in PromptShards(index)] == ["a red fox", "a blue cat", "noon"]
    assert "3 samples in 2 shards" in capsys.readouterr().out
    assert typed("check", out) == 0 and "is whole" in capsys.readouterr().out
    first = index.paths[0]
    first.write_bytes(first.read_bytes()[:-700])
    assert typed("check", out) == 1 and first.name in capsys.readouterr().out


def test_videos_go_in_with_their_captions(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    write_mp4(tmp_path / "own" / "a.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    (tmp_path / "c.csv").write_text("video,prompt\na.mp4,a red fox\n")
    words = (tmp_path / "own", "--captions", tmp_path / "c.csv", "--out", tmp_path / "set")
    assert typed("make", *words) == typed("check", tmp_path / "set") == 0
    assert "1 samples in 1 shard of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["make", "."], "--out is missing"),
        (["mke", "p.txt"], "error: make|check mke does not fit. It takes 'make' or 'check'"),
        (["make", "p.txt"], "p.txt is not there"),
        (["check", "nope"], "nope is not there"),
        (["check", "."], "There is no index of shards"),
        (["check", ".", "--captions", "c.csv", "--per_shard", "3"], "--captions, --per_shard was"),
        (["make", "p.txt", "-o", "set"], "p.txt is not there"),
        (["make"], "not given all that is required: SOURCE"),
        (["make", "p.txt", "--per_shrd", "3"], "Did you mean"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert typed(*words) == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_replaced_by_its_own_kind_alone_and_with_force(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("v", "other"):
        (tmp_path / f"{name}.txt").write_text("a red fox\na blue cat\nnoon\n")
    assert typed("make", "v.txt", "-o", "set", "--per-shard", 1) == 0
    before = content(tmp_path)
    for words, said in (
        (["v.txt"], "it holds the set 'v'. Give another --out, or --force"),
        (["other.txt"], "of the set 'v'. Give --out a folder"),
        (["other.txt", "--force"], "not of the set 'other'"),
    ):
        assert typed("make", *words, "-o", "set") == 2 and said in capsys.readouterr().err
    assert content(tmp_path) == before
    assert typed("make", "v.txt", "-o", "set", "--force") == 0
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["index.json", "v-000000.tar"]
    assert typed("check", "set") == 0
    (tmp_path / "set" / "index.json").unlink()  # as if it had been interrupted
    assert typed("make", "v.txt", "-o", "set") == 2 and "interrupted" in capsys.readouterr().err
    assert typed("make", "v.txt", "-o", "set", "--force", "--per-shard", 1) == 0
    assert content(tmp_path) == before


def test_what_is_no_set_is_never_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v").mkdir()
    write_mp4(tmp_path / "v" / "a.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    (tmp_path / "p.txt").write_text("a red fox\n")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "index.json").write_text("{}")
    before = content(tmp_path)
    for words, said in (
        (["v", "-o", "v"], "the source itself"),
        (["p.txt", "-o", "p.txt"], "the source itself, or a file"),
        (["p.txt", "-o", "v"], "holds what is not of the set 'p': 'a.mp4'"),
        (["p.txt", "-o", "web"], "'index.json', of another index"),
        (["p.txt", "-o", "new", "--captions", "c.csv"], "is no folder"),
    ):
        assert typed("make", *words, "--force") == 2 and said in capsys.readouterr().err
    assert content(tmp_path) == before
