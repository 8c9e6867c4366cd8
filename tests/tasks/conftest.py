"""Video files made by hand."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest


def make_video(path, seed=0, frames=5, size=(32, 32), noise=0.0, fps=8, colour=None):
    """A drawn wall that moves to the right; with noise, or of one colour."""
    rng = np.random.default_rng(seed)
    height, width = size
    wall = np.kron(rng.integers(30, 220, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    if colour is not None:
        wall = np.full_like(wall, colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "12", "threads": "1"}
        for index in range(frames):
            shown = np.roll(wall, index, 1) + noise * rng.standard_normal(wall.shape)
            picture = av.VideoFrame.from_ndarray(shown.clip(0, 255).astype(np.uint8), "rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def video():
    """Writes a video file, see :func:`make_video`."""
    return make_video


@pytest.fixture
def folders(tmp_path) -> Path:
    """Folders ``full``, ``near`` and ``far`` with the same four clips, one of them nested."""
    for seed, key in enumerate(("a", "b", "c", "deep/er")):
        for name, noise in (("full", 0.0), ("near", 4.0), ("far", 30.0)):
            make_video(tmp_path / name / f"{key}.mp4", seed, noise=noise)
    return tmp_path


@pytest.fixture
def screen(capsys, monkeypatch):
    """Makes standard error a terminal of 120 columns, or none; then reads what it showed."""

    def shown(terminal: bool):
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        return lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)

    return shown
