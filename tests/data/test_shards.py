"""Prompt shards: every prompt exactly once, the same bytes every time, damage refused."""

import doctest
import io
import json
import runpy
import tarfile
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.data.panorama import PALETTES
from lightning_kv.data.shards import (
    PromptShards,
    prompt_key,
    read_index,
    world_seed_of,
    write_prompt_shards,
)

ROOT = Path(__file__).parents[2]
SETS = (
    "panorama-fast13",
    "panorama-fast13-any",
    "panorama-quick",
    "panorama-slow12",
    "panorama-mixed",
)


def numbered(count: int) -> list[tuple[str, dict[str, str]]]:
    """Samples whose texts repeat, so that only their keys tell them apart."""
    return [(f"s-{i:03d}", {"prompt": f"text {i % 3}", "source": "test"}) for i in range(count)]


def write(folder: Path, count: int = 7, per_shard: int = 3):
    return write_prompt_shards(numbered(count), folder, "set", per_shard)


def test_order_limit_and_second_pass(tmp_path):
    index = write(tmp_path)
    everything = list(PromptShards(index))
    assert [sample.prompt for sample in everything] == [r["prompt"] for _, r in numbered(7)]
    assert list(PromptShards(index, limit=4)) == everything[:4]
    pipeline = PromptShards(index)
    assert list(pipeline) == list(pipeline) == everything


def test_shards_name_their_members_and_records(tmp_path):
    index = write(tmp_path)
    members = {}
    for path in index.paths:
        with tarfile.open(path) as tar:
            members[path.name] = tar.getnames()
            records = [json.load(tar.extractfile(name)) for name in tar.getnames()]
            assert all(record["source"] == "test" for record in records)
    assert members == {
        "set-000000.tar": ["s-000.json", "s-001.json", "s-002.json"],
        "set-000001.tar": ["s-003.json", "s-004.json", "s-005.json"],
        "set-000002.tar": ["s-006.json"],
    }


def test_writer_gives_the_same_bytes_whatever_the_clock_and_the_order_of_fields(tmp_path):
    write(tmp_path / "one")
    swapped = [(key, dict(reversed(record.items()))) for key, record in numbered(7)]
    with mock.patch("time.time", return_value=2e9):
        write_prompt_shards(swapped, tmp_path / "two", "set", 3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_longest_key_fits_into_a_tar(tmp_path):
    write_prompt_shards([("k" * 90, {"prompt": "x"})], tmp_path, "set", 1)
    assert len(list(PromptShards(read_index(tmp_path)))) == 1


def test_index_reads_back_from_the_folder_and_from_the_file(tmp_path):
    index = write(tmp_path)
    assert read_index(tmp_path) == read_index(tmp_path / "index.json") == index
    assert index.samples == 7
    assert [shard.samples for shard in index.shards] == [3, 3, 1]


@pytest.mark.parametrize("name", SETS)
def test_committed_sets_are_what_the_tool_writes(name, tmp_path):
    runpy.run_path(str(ROOT / "tools/make_panorama_shards.py"))["make"](tmp_path)
    written = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "data" / name).iterdir()}
    assert written == committed


@pytest.mark.parametrize(
    ("name", "count", "look"),
    [
        ("panorama-fast13", 64, ("fast", "n13", "left")),
        ("panorama-fast13-any", 32, ("fast", "n13", "any")),
        ("panorama-quick", 32, ("fast", "n10", "left")),
        ("panorama-slow12", 32, ("slow", "n12", "left")),
    ],
)
def test_committed_sets_are_balanced(name, count, look):
    words = [sample.prompt.split() for sample in PromptShards(read_index(ROOT / "data" / name))]
    assert len(words) == count
    assert {tuple(rest) for _, *rest in words} == {look}
    for four in (words[i : i + 4] for i in range(0, count, 4)):
        assert len({palette for palette, *_ in four}) == 4


def test_the_mixed_set_takes_turns():
    words = [s.prompt.split() for s in PromptShards(read_index(ROOT / "data/panorama-mixed"))]
    looks = {("fast", "n13", "any"): 4, ("fast", "n13", "left"): 2}
    looks |= {("slow", "n12", "left"): 1, ("fast", "n10", "left"): 1}
    assert len(words) == 96
    for start in range(0, 96, 8):
        eight = words[start : start + 8]
        assert Counter(tuple(rest) for _, *rest in eight) == looks
        assert len({palette for palette, *_ in eight[:4]}) == 4
        assert len({palette for palette, *_ in eight[4:]}) == 4
    met = Counter(tuple(word) for word in words)
    assert met == {(one, *look): 3 * looks[look] for one in PALETTES for look in looks}


def test_readme_of_the_sets_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = str(ROOT / "data/README.md")
    result = doctest.testfile(readme, module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_sets_share_no_world():
    samples = [s for name in SETS for s in PromptShards(read_index(ROOT / "data" / name))]
    assert len({sample.world_seed for sample in samples}) == len(samples) == 256
    torch.Generator().manual_seed(max(sample.world_seed for sample in samples))


def damage_truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-512])


def damage_flip(path: Path):
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
def test_damaged_shard_is_refused_by_name(damage, tmp_path):
    index = write(tmp_path)
    damage(index.paths[1])
    with pytest.raises(ValueError, match="missing or damaged") as error:
        read_index(tmp_path)
    assert str(index.paths[1]) in str(error.value)
    assert str(index.shards[1].bytes) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"samples": 8},
        {"samples": 0, "shards": []},
        {"shards": [{"file": "set-000000.tar"}]},
        {"shards": "set-000000.tar"},
        {"samples": 1, "shards": [{"file": "../a.tar", "samples": 1, "bytes": 0, "sha256": ""}]},
    ],
)
def test_index_that_makes_no_sense_is_refused(change, tmp_path):
    write(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="index of shards cannot be used"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_index_that_is_no_record_is_refused(text, tmp_path):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index of shards cannot be used"):
        read_index(tmp_path)


def test_folder_without_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no index") as error:
        read_index(tmp_path)
    assert str(tmp_path / "index.json") in str(error.value)


@pytest.mark.parametrize("key", ["a.b", "A", "", "a b", "a/b", "é", "a\n", "a" * 91])
def test_key_that_webdataset_would_break_is_refused(key, tmp_path):
    with pytest.raises(ValueError, match="not allowed") as error:
        write_prompt_shards([(key, {"prompt": "x"})], tmp_path, "set", 1)
    assert repr(key) in str(error.value)
    with pytest.raises(ValueError, match="not allowed"):
        write_prompt_shards(numbered(1), tmp_path, key, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("record", [{}, {"prompt": ""}, {"prompt": " "}, {"prompt": 3}, ["x"]])
def test_record_without_prompt_is_refused(record, tmp_path):
    with pytest.raises(ValueError, match="holds no prompt"):
        write_prompt_shards([("a", record)], tmp_path, "set", 1)


def test_repeated_key_and_empty_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two samples") as error:
        write_prompt_shards([*numbered(3), *numbered(1)], tmp_path, "set", 1)
    assert "s-000" in str(error.value)
    with pytest.raises(ValueError, match="nothing to write"):
        write_prompt_shards([], tmp_path, "set", 1)
    with pytest.raises(ValueError, match="nothing to write"):
        write_prompt_shards(numbered(2), tmp_path, "set", 0)


def test_foreign_shard_without_prompt_is_refused_while_reading(tmp_path):
    index = write(tmp_path, 1)
    with tarfile.open(index.paths[0], "w") as tar:
        tar.addfile(tarfile.TarInfo("s-000.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="holds no prompt") as error:
        list(PromptShards(index))
    assert str(index.paths[0]) in str(error.value)


def test_reading_switches_commands_and_pickles_off_unless_told_otherwise(tmp_path, monkeypatch):
    index = write(tmp_path)
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    monkeypatch.setenv("WDS_SECURE", "0")
    list(PromptShards(index))
    assert not webdataset.utils.enforce_security
    monkeypatch.delenv("WDS_SECURE")
    assert len(list(PromptShards(index))) == 7
    assert webdataset.utils.enforce_security
    with pytest.raises(ValueError, match="cannot open pipe"):
        webdataset.gopen("pipe:echo")


@given(st.text(max_size=100), st.text(max_size=100), st.integers(0, 2**63 - 1))
def test_prompt_keys_are_file_names_and_tell_texts_apart(one, two, world_seed):
    key = prompt_key(one, world_seed)
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not key.startswith("-")
    assert len(key) <= 64 + 9
    assert key.endswith(f"-{world_seed % 2**32:08x}")
    assert (prompt_key(two, world_seed) == key) == (one == two)


def test_world_seeds_are_stable_and_apart():
    seeds = {world_seed_of(seed, f"s-{i}") for seed in range(20) for i in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds).bit_length() == 63
