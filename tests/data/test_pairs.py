"""Pairs of videos: who belongs to whom, and frame to frame."""

import doctest
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lightning_kv.data import pairs
from lightning_kv.data.pairs import Alignment, Pair, pair_csv, pair_folders, read_pair
from lightning_kv.data.videos import VideoError, probe, read

SHARED = Path(__file__).parents[3] / "shared" / "videos" / "rollouts"


def video(path, frames=5, size=(48, 64), rate=16, start=0):
    """Lossless noise, of which frame n is the same in every video of that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        stream.height, stream.width = size
        stream.pix_fmt = "rgb24"
        for number in range(start, start + frames):
            noise = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    return path


def touched(folder, *names):
    """Files whose content does not matter."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_folders_pair_by_the_path_inside_without_suffix(tmp_path):
    ours = touched(tmp_path / "full", "b.mp4", "a/x.y.MKV", "only.mov", "notes.txt", ".h/c.mp4")
    theirs = touched(tmp_path / "cut", "a/x.y.webm", "b.mp4", "b.json", "x.mp4", "._b.mp4")
    (theirs / "folder.mp4").mkdir()
    found = pair_folders(ours, str(theirs))
    assert found.pairs == (
        Pair("a/x.y", ours / "a/x.y.MKV", theirs / "a/x.y.webm"),
        Pair("b", ours / "b.mp4", theirs / "b.mp4"),
    )
    assert (found.reference_alone, found.candidate_alone) == (("only",), ("x",))


def test_folders_that_do_not_pair_say_what_they_hold(tmp_path):
    ours = touched(tmp_path / "full", *(f"{i}_full.mp4" for i in range(5)))
    theirs = touched(tmp_path / "cut", "0_cut.mp4")
    with pytest.raises(ValueError, match=r"5 videos \('0_full', '1_full', '2_full', \.\.\.\)") as e:
        pair_folders(ours, theirs)
    assert "1 videos ('0_cut')" in str(e.value) and "--pairs" in str(e.value)
    with pytest.raises(ValueError, match="0 videos"):
        pair_folders(ours, touched(tmp_path / "empty", "notes.txt"))
    with pytest.raises(ValueError, match="no such folder"):
        pair_folders(ours, tmp_path / "absent")
    touched(ours, "3_full.webm")
    with pytest.raises(ValueError, match=r"3_full\.mp4 and .*3_full\.webm"):
        pair_folders(ours, theirs)


def table(tmp_path, text, encoding="utf-8"):
    touched(tmp_path, "r/a.mp4", "r/b.mp4", "c1/a.mp4", "c2/a.mp4")
    path = tmp_path / "pairs.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_a_table_of_pairs(tmp_path):
    text = (
        "candidate,reference,prompt\r\n"
        'c1/a.mp4,r/a.mp4,"a cat, asleep\non a mat"\r\n'
        f"{tmp_path}/c2/a.mp4, r/b.mp4 ,\r\n"
    )
    found = pair_csv(table(tmp_path, text, "utf-8-sig"))
    assert found.pairs == (
        Pair("a", tmp_path / "r/a.mp4", tmp_path / "c1/a.mp4", "a cat, asleep\non a mat"),
        Pair("b", tmp_path / "r/b.mp4", tmp_path / "c2/a.mp4"),
    )
    assert found.reference_alone == found.candidate_alone == ()


def test_a_reference_may_have_several_candidates_under_keys(tmp_path):
    lines = ["reference,candidate,key", "r/a.mp4,c1/a.mp4,one", "r/a.mp4,c2/a.mp4,two"]
    found = pair_csv(table(tmp_path, "\n".join(lines)))
    assert [pair.key for pair in found.pairs] == ["one", "two"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "columns"),
        ("a.mp4,b.mp4\n", "'a.mp4,b.mp4'"),
        ("reference;candidate\n", "reference;candidate"),
        ("reference,candidate,fps\n", "fps"),
        ("reference,candidate\n", "holds no pairs"),
        ("reference,candidate\nr/a.mp4,c1/a.mp4\nr/a.mp4,c2/a.mp4\n", "line 3: a key comes again"),
        ("reference,candidate\nr/a.mp4\n", "line 2: no pair"),
        ("reference,candidate\nr/a.mp4,\n", "line 2: no pair"),
        ("reference,candidate\nr/a.mp4,c1/a.mp4,a cat\n", "line 2: no pair"),
        ("reference,candidate\n\nr/a.mp4,c3/a.mp4\n", "line 3: no such file.*c3/a.mp4"),
    ],
)
def test_a_table_with_a_fault_says_where(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        pair_csv(table(tmp_path, text))


def test_a_table_that_is_no_text_or_not_there(tmp_path):
    with pytest.raises(ValueError, match="no table of pairs"):
        pair_csv(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="UTF-8"):
        pair_csv(table(tmp_path, "reference,candidate\nrés.mp4,c.mp4\n", "latin-1"))


def test_alike_videos_are_read_in_step(tmp_path):
    ours, theirs = video(tmp_path / "a.mp4"), video(tmp_path / "b.mkv")
    pieces = list(read_pair(ours, theirs, block=2))
    assert [len(right) for right, _ in pieces] == [2, 2, 1]
    assert all(torch.equal(right, judged) for right, judged in pieces)
    assert torch.equal(torch.cat([right for right, _ in pieces]), torch.cat(list(read(ours))))


def test_one_frame_is_enough(tmp_path):
    path = video(tmp_path / "a.mp4", frames=1)
    ((right, judged),) = read_pair(path, probe(path))
    assert right.shape == judged.shape == (1, 3, 48, 64)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("frames", [5, 6, 8])
def test_other_lengths_are_refused_or_cut(tmp_path, frames, swap):
    short, long = video(tmp_path / "a.mp4", 4), video(tmp_path / "b.mp4", frames)
    ours, theirs = (long, short) if swap else (short, long)
    counts = f"{frames} and 4 frames" if swap else f"4 and {frames} frames"
    with pytest.raises(VideoError, match=f"{counts}.*--length shortest"):
        read_pair(ours, theirs)
    for block in (1, 3, 4, 100):
        pieces = list(read_pair(ours, theirs, Alignment(length="shortest"), block))
        assert sum(len(right) for right, _ in pieces) == 4
        assert all(torch.equal(right, judged) for right, judged in pieces)


def test_other_sizes_are_refused_or_resized(tmp_path):
    ours, theirs = video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4", size=(96, 80))
    with pytest.raises(VideoError, match=r"64x48 and 80x96.*--resize"):
        read_pair(ours, theirs)
    ((right, judged),) = read_pair(ours, theirs, Alignment(size="resize"))
    assert torch.equal(right, next(read(ours)))
    assert torch.equal(judged, next(read(theirs, size=(48, 64))))


def test_other_rates_are_refused_or_ignored(tmp_path):
    ours = video(tmp_path / "a.mp4", rate=30)
    theirs = video(tmp_path / "b.mp4", rate=Fraction(30000, 1001))
    with pytest.raises(VideoError, match=r"30 and 29\.97 frames per second.*--fps ignore"):
        read_pair(ours, theirs)
    assert sum(len(right) for right, _ in read_pair(ours, theirs, Alignment(fps="ignore"))) == 5
    rounded = replace(probe(theirs), fps=Fraction(2997, 100))
    Alignment().check(probe(theirs), rounded)


def test_everything_that_differs_is_said_at_once(tmp_path):
    ours = probe(video(tmp_path / "a.mp4"))
    theirs = probe(video(tmp_path / "b.mp4", 6, (32, 32), 8))
    with pytest.raises(VideoError) as error:
        Alignment().check(ours, theirs)
    words = ("5 and 6 frames", "64x48 and 32x32", "16 and 8", "--length", "--resize", "--fps")
    assert all(word in str(error.value) for word in words)
    with pytest.raises(VideoError) as error:
        Alignment(length="shortest", size="resize").check(ours, theirs)
    assert "--length" not in str(error.value) and "--fps" in str(error.value)
    Alignment("shortest", "resize", "ignore").check(ours, theirs)


def test_a_damaged_partner_stops_the_pair(tmp_path):
    ours, theirs = video(tmp_path / "a.mp4", 30), video(tmp_path / "b.mp4", 30)
    info = probe(theirs)
    with av.open(str(theirs)) as container:
        place, size = next(
            (p.pos, p.size) for n, p in enumerate(container.demux(video=0)) if n == 20
        )
    data = bytearray(theirs.read_bytes())
    data[place : place + size] = bytes(size)
    theirs.write_bytes(data)
    with pytest.raises(VideoError, match=r"b\.mp4 is damaged"):
        list(read_pair(ours, info))


def test_the_recipe_says_what_was_done():
    assert Alignment().recipe == "length=equal,size=equal,fps=equal"
    resized = Alignment(size="resize", fps="ignore").recipe
    assert resized == "length=equal,size=resize(bicubic,antialias),fps=ignore"
    for wrong in ({"length": "longest"}, {"size": "crop"}, {"fps": "30"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} '.*Give one of 'equal'"):
            Alignment(**wrong)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/videos is not here")
def test_real_rollouts_pair_through_a_table(tmp_path):
    names = sorted(
        path.name.removesuffix("_baseline.mp4") for path in SHARED.glob("*_baseline.mp4")
    )
    lines = [f"{SHARED}/{n}_baseline.mp4,{SHARED}/{n}_forcingkv.mp4,{n}" for n in names]
    (tmp_path / "pairs.csv").write_text("\n".join(["reference,candidate,key", *lines]))
    found = pair_csv(tmp_path / "pairs.csv").pairs
    assert len(found) == 8
    for pair in found:
        Alignment().check(probe(pair.reference), probe(pair.candidate))
    right, judged = next(read_pair(found[0].reference, found[0].candidate))
    error = (right.float() - judged.float()).square().mean(dim=(1, 2, 3))
    assert right.shape == judged.shape == (8, 3, 480, 832)
    assert error.max() < 255**2 / 100  # the same prompt and seed: 20 dB and more


def test_examples_run():
    result = doctest.testmod(pairs)
    assert result.attempted and not result.failed
