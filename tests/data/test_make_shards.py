"""Shards out of lists and folders, and back again."""

import json
import tarfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from lightning_kv.data.check_shards import check_shards
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.make_shards import make_prompt_shards, make_video_shards
from lightning_kv.data.shards import PromptShards, read_index
from lightning_kv.data.video_clips import find_videos
from lightning_kv.data.videos import read
from lightning_kv.utilities.files import checksum

SHARED = Path(__file__).parents[3] / "shared"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder):
    """What tarfile alone finds in a set, by key."""
    found = {}
    for path in read_index(folder).paths:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    found[info.name[:-5]] = json.load(tar.extractfile(info))
    return found


@shared
@pytest.mark.parametrize("name", ["vbench_full_info.json", "vbench_all_dimension.txt"])
def test_the_prompts_of_vbench_there_and_back(tmp_path, name):
    source = SHARED / "prompts" / name
    index = make_prompt_shards(source, tmp_path / "one", per_shard=100)
    assert (index.samples, len(index.shards)) == (946, 10)
    assert check_shards(tmp_path / "one") == []
    texts = (SHARED / "prompts/vbench_all_dimension.txt").read_text().splitlines()
    assert [sample.prompt for sample in PromptShards(read_index(tmp_path / "one"))] == texts
    assert PromptDataModule(tmp_path / "one").prompt_texts() == texts
    if source.suffix == ".json":
        given = json.loads(source.read_text())
        for held, entry in zip(records(tmp_path / "one").values(), given, strict=True):
            assert held.pop("source") == name and held.pop("prompt") == entry.pop("prompt_en")
            assert held == entry
    with mock.patch("time.time", return_value=2e9):
        make_prompt_shards(source, tmp_path / "two", per_shard=100)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffa cat, a hat\r\n\n  a dog \n"),
        ("a.csv", 'seed,prompt\n1,"a cat, a hat"\n2,a dog\n'),
        ("a.json", '["a cat, a hat", {"caption": "a dog", "seed": 7}]'),
    ],
)
def test_lists_of_every_kind(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    make_prompt_shards(tmp_path / name, tmp_path / "set")
    held = records(tmp_path / "set")
    assert [record["prompt"] for record in held.values()] == ["a cat, a hat", "a dog"]
    assert list(held) == ["a-000000", "a-000001"]
    if name == "a.csv":
        assert [record["seed"] for record in held.values()] == ["1", "2"]
    assert check_shards(tmp_path / "set") == []


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", None, "cannot be read as text"),
        ("a.txt", b"\n \n", "There are no prompts"),
        ("a.txt", "schön".encode("latin-1"), "cannot be read as text"),
        ("a.txt", b"x" * 10**5, "A prompt is too long"),
        ("a.csv", b"", "There are no prompts"),
        ("a.csv", b"text2\nx\n", "There is no prompt"),
        ("a.csv", b"prompt,seed\nx\n", "another number of cells"),
        ("a.csv", b"prompt\nx,y\n", "another number of cells"),
        ("a.csv", b'prompt\n"x', "cannot be read as a table"),
        ("a.json", b"{", "is no JSON"),
        ("a.json", b"3", "holds no list"),
        ("a.json", b"[3]", "There is no prompt"),
        ("a.json", b'[{"prompt": ""}]', "holds no prompt"),
        ("a.json", b'[{"prompt_en": ["x"]}]', "holds no prompt"),
        ("a.json", b'["\\ud800"]', "no text that can be written"),
        ("a.json", b"[" * 10**5, "is no JSON"),
        ("a.json", b'[{"prompt": "x", "seed": NaN}]', "cannot be written as JSON"),
        ("a.mp4", b"x", "no list that can be read"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, raw, said):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        make_prompt_shards(tmp_path / name, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_folder_of_videos_there_and_back(tmp_path, films):
    index = make_video_shards(films, tmp_path / "one", shard_videos=2)
    assert [shard.samples for shard in index.shards] == [2, 2, 1]
    assert check_shards(tmp_path / "one") == []
    held = {sample.key: sample for sample in find_videos(tmp_path / "one")}
    names = {key: record["name"] for key, record in records(tmp_path / "one").items()}
    assert sorted(names.values()) == ["B side", "a", "b", "d", "in/c"]
    assert {"a", "b", "d"} < set(held) and any(key.startswith("b-side-") for key in held)
    for key, name in names.items():
        source = films / f"{name}.mp4"
        assert held[key].bytes == source.stat().st_size
        assert checksum(held[key].video) == checksum(source)
        assert torch.equal(torch.cat(list(read(held[key].video))), torch.cat(list(read(source))))
    prompts = {names[key]: sample.prompt for key, sample in held.items() if sample.prompt}
    assert prompts == {"a": "a red square", "in/c": "a blue square"}
    with mock.patch("time.time", return_value=2e9):
        make_video_shards(films, tmp_path / "two", name=index.name, shard_videos=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@shared
def test_the_real_videos_there_and_back(tmp_path):
    """Every format of torchcodec's collection as it is, frame by frame."""
    folder = SHARED / "videos/formats"
    make_video_shards(folder, tmp_path, shard_bytes=2**18)
    assert len(read_index(tmp_path).shards) > 2 and check_shards(tmp_path) == []
    names = {key: record["name"] for key, record in records(tmp_path).items()}
    samples = find_videos(tmp_path)
    assert len(samples) == 13
    for sample in samples:
        (source,) = folder.glob(f"{names[sample.key]}.*")
        pieces = zip(read(sample.video), read(source), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pieces)


@shared
@pytest.mark.slow
def test_the_real_rollouts_there_and_back(tmp_path):
    folder = SHARED / "videos/rollouts"
    make_video_shards(folder, tmp_path, shard_bytes=2**22)
    assert check_shards(tmp_path) == []
    for sample in find_videos(tmp_path):
        pieces = zip(read(sample.video), read(folder / f"{sample.key}.mp4"), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pieces)


def test_shards_are_filled_up_to_their_bytes(tmp_path, films):
    sizes = [path.stat().st_size for path in sorted(films.rglob("*.mp4"))]
    assert len(make_video_shards(films, tmp_path / "a", shard_bytes=1).shards) == 5
    assert len(make_video_shards(films, tmp_path / "b", shard_bytes=10 * sum(sizes)).shards) == 1


TABLES = {
    "a.csv": "video,prompt\na,1\nb.mp4,2\nB side,3\nin/c,4\nd,5\n",
    "a.json": '{"a": "1", "b.mp4": "2", "B side": "3", "in/c": "4", "d": "5"}',
    "b.json": json.dumps(
        [
            {"video": v, "caption": str(i)}
            for i, v in enumerate(("a", "b", "B side", "in/c", "d"), 1)
        ]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_captions_in_a_table(tmp_path, films, name):
    (tmp_path / name).write_text(TABLES[name])
    make_video_shards(films, tmp_path / "set", captions=tmp_path / name)
    held = {record["name"]: record["prompt"] for record in records(tmp_path / "set").values()}
    assert held == {"a": "1", "b": "2", "B side": "3", "in/c": "4", "d": "5"}


def test_captions_by_the_paths_of_the_files(tmp_path, films, monkeypatch):
    """As `lightning-kv export` writes them: from where it was typed."""
    monkeypatch.chdir(films.parent)
    videos = [path for path in films.rglob("*.*") if path.suffix not in (".txt", ".json")]
    said = {str(path.relative_to(films.parent)): path.name for path in videos}
    (tmp_path / "said.json").write_text(json.dumps(said))
    make_video_shards(films, tmp_path / "set", captions=tmp_path / "said.json")
    held = records(tmp_path / "set").values()
    assert len(held) == 5
    assert all(Path(record["prompt"]).stem == Path(record["name"]).name for record in held)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("video,prompt\na,1\n", "leaves videos without a caption"),
        ("video,prompt\na,1\na.mp4,1\n", "a video comes again"),
        ("video,prompt\n../a,1\n", "no such video"),
        ("video,prompt\n,1\n", "no such video"),
        ("video\na\n", "There is no prompt"),
        ("prompt\na\n", "no such video"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path, films, table, said):
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(ValueError, match=said):
        make_video_shards(films, tmp_path / "set", captions=tmp_path / "a.csv")
    assert not (tmp_path / "set").exists()


def test_folders_that_cannot_be_used(tmp_path, film):
    with pytest.raises(ValueError, match="no such folder"):
        make_video_shards(tmp_path / "none", tmp_path / "set")
    (tmp_path / "films").mkdir()
    with pytest.raises(ValueError, match="There are no videos"):
        make_video_shards(tmp_path / "films", tmp_path / "set")
    film(tmp_path / "films/a.mp4", 3)
    (tmp_path / "films/b.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Cannot read .*b\.mp4"):
        make_video_shards(tmp_path / "films", tmp_path / "set")
    (tmp_path / "films/b.mp4").unlink()
    for bad in ("../x", "A", "a/b", ""):
        with pytest.raises(ValueError, match="not allowed"):
            make_video_shards(tmp_path / "films", tmp_path / "set", name=bad)
    for more in ({"shard_videos": 0}, {"shard_bytes": 0}):
        with pytest.raises(ValueError, match="nothing to write"):
            make_video_shards(tmp_path / "films", tmp_path / "set", **more)
    assert not (tmp_path / "set").exists()


def test_an_interrupted_set_has_no_index(tmp_path, films, monkeypatch):
    make_video_shards(films, tmp_path, shard_videos=1)
    monkeypatch.setattr(
        "lightning_kv.data.shards.checksum", mock.Mock(side_effect=KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make_video_shards(films, tmp_path, shard_videos=2)
    assert "There is no index" in check_shards(tmp_path)[0]


def test_the_check_says_what_is_not_in_the_index_and_every_damage(tmp_path, films):
    index = make_video_shards(films, tmp_path, shard_videos=1)
    make_video_shards(films, tmp_path, shard_videos=3)
    findings = check_shards(tmp_path)
    assert len(findings) == 3 and all("is not in the index" in each for each in findings)
    make_video_shards(films, tmp_path, shard_videos=1)
    index.paths[0].unlink()
    index.paths[1].write_bytes(index.paths[1].read_bytes()[:-1])
    index.paths[2].write_bytes(b"x" + index.paths[2].read_bytes()[1:])
    found = "\n".join(check_shards(tmp_path))
    assert all(str(path) in found for path in index.paths[:3])
    assert str(index.paths[3]) not in found
