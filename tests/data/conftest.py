"""Small videos and tars made by hand."""

import hashlib
import io
import json
import tarfile

import av
import numpy as np
import pytest


def make_film(path, frames=10, size=(32, 48), seed=0, fps=8):
    """Noise in big squares, another picture in every frame."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        for _ in range(frames):
            small = rng.integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
            picture = small.repeat(8, 0).repeat(8, 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode())
    return path


def make_tar(path, files, **more):
    """A tar of names and contents, as anybody's tool might write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, more.get("mode", "w")) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_index(folder, samples, **more):
    """An index that vouches for whatever tars lie there, with so many samples in each."""
    shards = []
    for path, count in zip(sorted(folder.glob("*.tar")), samples, strict=True):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        shards.append(
            {"file": path.name, "samples": count, "bytes": len(content), "sha256": digest}
        )
    record = {"schema": 1, "name": "set", "samples": sum(samples), "shards": shards} | more
    (folder / "index.json").write_text(json.dumps(record))


@pytest.fixture(scope="session")
def film():
    """Writes a video file, see :func:`make_film`."""
    return make_film


@pytest.fixture(scope="session")
def tar():
    """Writes a tar file, see :func:`make_tar`."""
    return make_tar


@pytest.fixture(scope="session")
def vouch():
    """Writes an index, see :func:`make_index`."""
    return make_index


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """A folder of five videos of 3 to 35 frames, one nested, two with captions."""
    folder = tmp_path_factory.mktemp("films")
    for seed, (key, frames) in enumerate(
        {"a": 10, "b": 35, "B side": 3, "in/c": 20, "d": 16}.items()
    ):
        make_film(folder / f"{key}.mp4", frames, seed=seed)
    (folder / "a.txt").write_text("a red square\n")
    (folder / "in/c.json").write_text('{"caption": "a blue square"}')
    return folder
