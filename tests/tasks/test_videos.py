"""Videos of a clip, piece by piece."""

import numpy as np
import pytest
import torch

from lightning_kv.data.videos import probe, read
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.tasks.videos import has_comparison, write_comparison


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.open("mark", {})
    return run


def shots(level, frames=10):
    return np.full((frames, 32, 48, 3), level, np.uint8)


def pieces(rows, size):
    """The same panels, a few frames at a time."""
    total = len(rows[0][1])
    for start in range(0, total, size):
        yield [(label, frames[start : start + size]) for label, frames in rows]


def test_pieces_make_the_film_of_the_whole(run, monkeypatch):
    written = {}  # the encoder's threads make no two files alike
    monkeypatch.setattr(
        "lightning_kv.tasks.videos.write_mp4",
        lambda path, frames, fps: written.update({path: np.concatenate(list(frames))}),
    )
    rng = np.random.default_rng(0)
    rows = [
        (name, rng.integers(0, 255, (10, 32, 48, 3)).astype(np.uint8)) for name in ("full", "a")
    ]
    for size in (3, 10):
        write_comparison(run, f"{size}", lambda size=size: pieces(rows, size), 10, 8, "full")
    for folder in (run.videos, run.differences):
        assert np.array_equal(written[folder / "3.mp4"], written[folder / "10.mp4"])
    assert len(written) == 4


def test_a_film_is_where_it_is_looked_for(run):
    write_comparison(
        run, "k/1", lambda: iter([[("full", shots(9)), ("a", shots(99))]]), 10, 8, "full"
    )
    assert has_comparison(run, "k/1") and not has_comparison(run, "other")
    for folder in (run.videos, run.differences):
        info = probe(folder / "k__1.mp4")
        assert (info.frames, float(info.fps)) == (10, 8)


def test_the_difference_is_dark_where_a_clip_equals_the_reference(run):
    rows = [("full", shots(90)), ("same", shots(90)), ("other", shots(120))]
    write_comparison(run, "k", lambda: iter([rows]), 10, 8, "full")
    shown = torch.cat(list(read(run.differences / "k.mp4"))).float()
    width = shown.shape[-1] // 3
    middle = [shown[..., 40:80, w * width + 20 : (w + 1) * width - 20].mean() for w in range(3)]
    assert middle[0] == pytest.approx(90, abs=4), "the reference as it is"
    assert abs(middle[1] - middle[2]) > 50, "four times 30 levels"


@pytest.mark.parametrize("labels", [["a", "b"], ["full"]])
def test_without_something_to_compare_there_is_no_second_film(run, labels):
    write_comparison(
        run, "k", lambda: iter([[(label, shots(90)) for label in labels]]), 10, 8, "full"
    )
    assert (run.videos / "k.mp4").is_file() and not list(run.differences.glob("*"))


def test_films_that_a_kill_left_half_done_are_made_again(run, monkeypatch):
    """Whatever is killed between the two, what is there counts as nothing."""
    written = []

    def killed(path, frames, fps):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.touch()

    monkeypatch.setattr("lightning_kv.tasks.videos.write_mp4", killed)
    rows = [("full", shots(90)), ("a", shots(99))]
    with pytest.raises(KeyboardInterrupt):
        write_comparison(run, "k", lambda: iter([rows]), 10, 8, "full")
    assert len(written) == 1 and not has_comparison(run, "k")
