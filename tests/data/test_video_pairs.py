"""Which videos belong together."""

from fractions import Fraction

import pytest

from lightning_kv.commands.compare import CompareOptions, find_videos
from lightning_kv.data.pairs import Alignment
from lightning_kv.data.video_pairs import PairedClip, alignable, shortest
from lightning_kv.data.videos import VideoError, VideoInfo


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
    return find_videos(CompareOptions(tree / "out", places, **given))


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
    videos = find_videos(CompareOptions(tree / "out", pairs=table))
    assert (videos.reference, videos.candidates) == ("reference", ("candidate",))
    with pytest.raises(ValueError, match="Give one or the other"):
        found(tree, "full", "near", pairs=table)
    with pytest.raises(ValueError, match=r"and so do --unpaired\. Give one or the other"):
        find_videos(CompareOptions(tree / "out", pairs=table, unpaired=True))
    with pytest.raises(ValueError, match="Nothing to compare: 0 folder"):
        find_videos(CompareOptions(tree / "out"))


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
