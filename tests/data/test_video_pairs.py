"""Which videos belong together."""

from fractions import Fraction

import pytest

from lightning_kv.data.datamodule import VideoPairDataModule
from lightning_kv.data.make_shards import make_video_shards
from lightning_kv.data.pairs import Alignment, pair_folders
from lightning_kv.data.video_pairs import PairedClip, alignable, apart, joined, shortest
from lightning_kv.data.videos import VideoError, VideoInfo
from lightning_kv.tasks.compare import paired_videos


@pytest.fixture
def tree(tmp_path):
    """Empty files: who is paired with whom does not depend on what is in them."""
    names = [
        "full/a",
        "full/b",
        "full/in/c",
        "near/a",
        "near/in/c",
        "far/b",
        "far/z",
        "other/near/a",
    ]
    for name in names:
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def found(tree, *folders, **given):
    places = tuple(tree / folder for folder in folders)
    return paired_videos(places, **given)


def test_every_candidate_has_its_own_pairs(tree):
    videos = found(tree, "full", "near", "far")
    assert (videos.reference, videos.candidates) == ("full", ("near", "far"))
    assert {clip.key: list(clip.candidates) for clip in videos.clips} == {
        "a": ["near"],
        "b": ["far"],
        "in/c": ["near"],
    }
    assert videos.files == {
        "full": {key: tree / f"full/{key}.mp4" for key in ("a", "b", "in/c")},
        "near": {key: tree / f"near/{key}.mp4" for key in ("a", "in/c")},
        "far": {"b": tree / "far/b.mp4"},
    }
    assert len(videos.notes) == 3 and "far" in videos.notes[-1] and "z" in videos.notes[-1]


def test_folders_of_one_name_are_told_apart(tree):
    videos = found(tree, "full", "near", "other/near")
    assert len(set(videos.candidates)) == 2 and videos.candidates[1] == "other/near"


def test_folders_without_pairs(tree):
    videos = found(tree, "full", "far", unpaired=True)
    assert [clip.key for clip in videos.clips] == [
        "full/a",
        "full/b",
        "full/in/c",
        "far/b",
        "far/z",
    ]
    for clip in videos.clips:
        assert (clip.reference is None) == (list(clip.candidates) == ["far"])
    assert not videos.notes


def test_one_folder_written_in_two_ways(tree):
    with pytest.raises(ValueError, match="A folder is given twice"):
        found(tree, "full", "near", "full/../near")
    (tree / "link").symlink_to(tree / "near")
    with pytest.raises(ValueError, match="A folder is given twice"):
        found(tree, "full", "near", "link", unpaired=True)


def test_a_table_and_folders_contradict_each_other(tree):
    table = tree / "pairs.csv"
    table.write_text("reference,candidate\nfull/a.mp4,near/a.mp4\n")
    videos = paired_videos((), table)
    assert (videos.reference, videos.candidates) == ("reference", ("candidate",))
    with pytest.raises(ValueError, match="Give one or the other"):
        found(tree, "full", "near", pairs=table)
    with pytest.raises(ValueError, match=r"and so do --unpaired\. Give one or the other"):
        paired_videos((), table, unpaired=True)
    with pytest.raises(ValueError, match="Nothing to compare: given 0 folders"):
        paired_videos(())


def info(path, frames, width=32):
    return VideoInfo(path, width, 32, Fraction(8), frames, 0, 0, "h264", "yuv420p", 8, "rgb", True)


@pytest.mark.parametrize(
    ("given", "able", "frames"),
    [
        ({}, [], None),
        ({"length": "shortest"}, ["a", "b"], 16),
        ({"length": "shortest", "size": "resize"}, ["a", "b", "wide"], 3),
    ],
)
def test_a_clip_is_cut_to_the_shortest_of_those_that_fit(tmp_path, given, able, frames):
    names = ("full", "a", "b", "wide", "broken")
    paths = {name: tmp_path / name for name in names}
    infos = {
        paths["full"]: info(paths["full"], 24),
        paths["a"]: info(paths["a"], 16),
        paths["b"]: info(paths["b"], 30),
        paths["wide"]: info(paths["wide"], 3, width=64),
        paths["broken"]: VideoError("It cannot be read."),
    }
    clip = PairedClip("k", "", paths["full"], {name: paths[name] for name in names[1:]})
    alignment = Alignment(**given)
    assert list(alignable(clip, infos, alignment)) == able
    assert shortest(clip, infos, alignment) == frames
    alone = PairedClip("k", "", None, {"a": paths["a"]})
    assert shortest(alone, infos, alignment) is None
    unreadable = PairedClip("k", "", paths["broken"], {"a": paths["a"]})
    assert shortest(unreadable, infos, alignment) is None


def test_shards_are_compared_as_their_folder_is(tmp_path, films):
    """A folder of shards stands for the videos that it was made of."""
    for name in ("a", "b", "d"):
        (tmp_path / "films").mkdir(exist_ok=True)
        (tmp_path / f"films/{name}.mp4").write_bytes((films / f"{name}.mp4").read_bytes())
    make_video_shards(tmp_path / "films", tmp_path / "shards", shard_videos=2)
    seen = []
    for reference, candidate in (("films", "films"), ("films", "shards"), ("shards", "films")):
        pairs = pair_folders(tmp_path / reference, tmp_path / candidate)
        assert [pair.key for pair in pairs.pairs] == ["a", "b", "d"]
        data = VideoPairDataModule(joined("ours", {"theirs": pairs}))
        sums = data.describe()["files"]
        assert sums["ours"] == sums["theirs"] and None not in sums["ours"].values()
        seen.append([(p.name, p.key, p.ends, p.pixels.sum()) for p in data.test_dataloader()])
        assert all(p.target is None or p.pixels.equal(p.target) for p in data.test_dataloader())
    assert seen[0] == seen[1] == seen[2]
    assert len(apart(["a", "b"], [tmp_path / "films", tmp_path / "shards"]).clips) == 6
    next((tmp_path / "shards").glob("*-000001.tar")).unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        pair_folders(tmp_path / "films", tmp_path / "shards")
