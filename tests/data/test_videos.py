"""Video files: every pixel as it is shown, every frame, or an error."""

import doctest
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kv.data import videos
from lightning_kv.data.videos import VideoError, probe, read

SHARED = Path(__file__).parents[3] / "shared" / "videos"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/videos is not here")
av.logging.set_level(None)

# file: (width, height, fps), (frames, hidden, rotation), (codec, bits, matrix, full), chroma site
ASSUMED = "bt601 (assumed)"
FORMATS = {
    "av1_video.mkv": ((640, 360, 25), (125, 0, 0), ("av1", 8, "bt709", False), "centre"),
    "bt601_full_range.mp4": ((320, 240, 30), (60, 0, 0), ("h264", 8, "bt601", True), "left"),
    "bt601_limited_range.mp4": ((320, 240, 30), (60, 0, 0), ("h264", 8, "bt601", False), "left"),
    "discard_first_keyframe.mp4": ((64, 64, 25), (25, 5, 0), ("h264", 8, ASSUMED, False), "left"),
    "h264_10bits.mp4": ((200, 200, 30), (30, 0, 0), ("h264", 10, ASSUMED, False), "left"),
    "h265_video.mp4": ((128, 128, 10), (10, 0, 0), ("hevc", 8, ASSUMED, False), "left"),
    "nasa_13013.mp4": ((320, 180, 25), (325, 0, 0), ("h264", 8, "bt709", False), "left"),
    "nasa_13013_rotated.mp4": (
        (270, 480, Fraction(30000, 1001)),
        (17, 0, 90),
        ("h264", 8, "bt709", False),
        "left",
    ),
    "test_non_zero_start.mp4": ((200, 112, 30), (12, 0, 0), ("h264", 8, ASSUMED, False), "left"),
    "testsrc2_odd_height_and_width_444.mp4": (
        (321, 241, 25),
        (25, 0, 0),
        ("h264", 8, ASSUMED, False),
        "left",
    ),
    "testsrc2_odd_height_and_width_mpeg2.mp4": (
        (121, 81, 25),
        (10, 0, 0),
        ("mpeg2video", 8, ASSUMED, False),
        "left",
    ),
    "testsrc2_vp8.webm": ((1280, 720, 30), (30, 0, 0), ("vp8", 8, "bt601", False), "centre"),
    "testsrc2_vp9.webm": ((1280, 720, 30), (30, 0, 0), ("vp9", 8, ASSUMED, False), "centre"),
}
FAST = {"deadline": "realtime", "cpu-used": "8"}  # of libvpx
WEIGHTS = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114)}  # of red and of blue in luma


def to_rgb(planes, bits, matrix, full):
    """BT.601, BT.709 as the recommendations say; planes [H, W] to unrounded [H, W, 3]."""
    y, u, v = (plane.astype(float) / 2 ** (bits - 8) for plane in planes)
    y, u, v = (y, u - 128, v - 128) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    y, u, v = (y, u, v) if full else (255 * y, 255 * u, 255 * v)
    red, blue = WEIGHTS[matrix.removesuffix(" (assumed)")]
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return np.clip(np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1), 0, 255)


def to_yuv(rgb, bits, matrix, full):
    """The way back, for colours in [0, 255]; rounded."""
    red, blue = WEIGHTS[matrix]
    r, g, b = np.moveaxis(np.asarray(rgb, float) / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    scale = 2 ** (bits - 8)
    whole = (255 * y, 255 * u + 128, 255 * v + 128)
    part = (219 * y + 16, 224 * u + 128, 224 * v + 128)
    return [np.rint(scale * plane) for plane in (whole if full else part)]


def spread(plane, length, site, axis):
    """Linear interpolation of subsampled chroma along an axis, as swscale defines its places.

    Of an odd length it stretches the samples: 61 of them over 121 pixels, not 122.
    """
    if plane.shape[axis] == length:
        return plane
    where = (np.arange(length) + 0.5) * plane.shape[axis] / length
    where = np.clip(where - {"left": 0.25, "centre": 0.5}[site], 0, plane.shape[axis] - 1)
    below = np.floor(where).astype(int)
    above = np.minimum(below + 1, plane.shape[axis] - 1)
    part = (where - below).reshape((-1, 1) if axis == 0 else (1, -1))
    return plane.take(below, axis) * (1 - part) + plane.take(above, axis) * part


def planes_of(frame, site):
    kind = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
    for plane in frame.planes:
        whole = np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width]
        across = spread(whole.astype(float), frame.width, site, 1)
        yield spread(across, frame.height, "centre", 0)


def write(path, frames, codec="libx264", pix_fmt="yuv420p", rate=25, **more):
    """Write frames (arrays of rgb24, or ready ones); more: options, container, tags, colours."""
    options = more.get("options", {"qp": "0"} if codec == "libx264" else {})
    with av.open(str(path), "w", options=more.get("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = pix_fmt
        stream.metadata.update(more.get("tags", {}))
        for name, value in more.get("colours", {}).items():
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(frames):
            if not isinstance(frame, av.VideoFrame):
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def moving(count=40, height=96, width=128, seed=0):
    """Frames that compress badly enough for every packet to weigh something."""
    draw = np.random.default_rng(seed)
    strip = draw.integers(0, 216, (height // 8, width // 8 + count, 3), np.uint8)
    for i in range(count):
        still = np.kron(strip[:, i : i + width // 8], np.ones((8, 8, 1), np.uint8))
        yield still + draw.integers(0, 40, still.shape, np.uint8)


def numbered(count, size=16):
    """Flat frames whose grey says their number."""
    return [np.full((size, size, 3), 10 * i, np.uint8) for i in range(count)]


def whole(path, **more):
    return torch.cat(list(read(path, **more)))


def packets_of(path):
    """Place in the file and size of what is stored, in bytes."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def refused(path, *words):
    with pytest.raises(VideoError) as error:
        whole(path)
    assert all(word in str(error.value) for word in (str(path), *words)), str(error.value)


@shared
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_whole_and_in_its_colours(name):
    (width, height, fps), (frames, hidden, rotation), (codec, bits, matrix, full), site = FORMATS[
        name
    ]
    info = probe(SHARED / "formats" / name)
    assert (info.width, info.height, info.fps) == (width, height, fps)
    assert (info.frames, info.hidden, info.rotation) == (frames, hidden, rotation)
    assert (info.codec, info.bits, info.matrix, info.full_range) == (codec, bits, matrix, full)
    assert info.source == f"decoded:{codec}"
    assert sum(len(piece) for piece in read(info, block=32)) == frames
    first = next(read(info, block=3))
    assert first.shape == (3, 3, height, width) and first.dtype == torch.uint8
    with av.open(str(info.path)) as container:
        for shown, frame in zip(first, container.decode(video=0), strict=False):
            slow = to_rgb(planes_of(frame, site), bits, matrix, full)
            slow = np.rot90(slow, rotation // 90)
            error = np.abs(slow - shown.permute(1, 2, 0).numpy())
            assert error.max() < 0.6, error.max()


@shared
@pytest.mark.parametrize(
    "name, frames", [("longlive_5s_01_baseline", 81), ("self_forcing_30s_02_forcingkv", 477)]
)
def test_rollouts(name, frames):
    info = probe(SHARED / "rollouts" / f"{name}.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (frames, 832, 480, 16)
    assert info.hidden == 0
    if frames == 81:
        assert [len(piece) for piece in read(info)] == [8] * 10 + [1]


@shared
def test_memory_does_not_grow_with_length():
    code = """
import resource, sys
from lightning_kv.data.videos import read
frames, peaks = 0, {}
for piece in read(sys.argv[1], block=8):
    frames += len(piece)
    peaks[frames] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if frames == 144:
        break
print(peaks[144] - peaks[24])
"""
    long = str(SHARED / "rollouts" / "self_forcing_30s_02_baseline.mp4")
    run = [sys.executable, "-c", code, long]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown < 10 * 480 * 832 * 3 / 1024  # KiB: far less than the 120 frames more


COLOURS = np.array(
    [
        [255, 255, 255],
        [0, 0, 0],
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [30, 90, 200],
        [220, 180, 7],
    ]
)


def patches(bits, matrix, full, size=(7 * 16, 16)):
    """A frame of colour patches in yuv444p, by the recommendation's formulas."""
    rgb = np.repeat(COLOURS[None], 16, 0).repeat(16, 1)
    planes = np.stack(to_yuv(rgb, bits, matrix, full)).clip(0, 2**bits - 1)
    if bits == 8:
        return av.VideoFrame.from_ndarray(planes.astype(np.uint8), format="yuv444p")
    frame = av.VideoFrame(*size, "yuv444p10le")
    for plane, values in zip(frame.planes, planes, strict=True):
        padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        padded[:, : plane.width] = values
        plane.update(padded)
    return frame


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", ASSUMED])
@pytest.mark.parametrize("full", [False, True, None])
def test_known_colours_come_back(tmp_path, bits, matrix, full):
    frame = patches(bits, matrix.removesuffix(" (assumed)"), bool(full))
    tags = {"bt601": 6, "bt709": 1, ASSUMED: 2}
    colours = {"colorspace": tags[matrix], "color_range": {None: 0, False: 1, True: 2}[full]}
    frame.colorspace, frame.color_range = colours["colorspace"], colours["color_range"]
    path = write(tmp_path / "a.mp4", [frame], pix_fmt=frame.format.name, colours=colours)
    info = probe(path)
    assert (info.bits, info.matrix, info.full_range) == (bits, matrix, bool(full))
    shown = whole(path)[0, :, 8, 8::16].T.numpy().astype(int)
    assert np.abs(shown - COLOURS).max() <= (1 if bits == 8 else 0) + (matrix == "bt709")


def test_rgb_stored_without_loss_comes_back_exactly(tmp_path):
    frames = list(moving(5, 48, 64))
    path = write(tmp_path / "a.mkv", frames, "libx264rgb", "rgb24", options={"qp": "0"})
    assert probe(path).matrix == "rgb"
    assert torch.equal(whole(path, block=2), torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))


def test_frames_come_in_the_order_shown_with_b_frames(tmp_path):
    path = write(
        tmp_path / "a.mp4", numbered(20, 64), options={"bf": "3", "b_strategy": "0", "qp": "1"}
    )
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    assert whole(path)[:, 0, 8, 8].float().sub(10 * torch.arange(20)).abs().max() <= 2


def test_one_frame(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(1))
    assert probe(path).frames == 1 and whole(path).shape == (1, 3, 16, 16)


def test_sizes_are_those_of_a_known_resampler(tmp_path):
    path = write(tmp_path / "a.mkv", moving(2, 48, 64), "libx264rgb", "rgb24", options={"qp": "0"})
    stored = whole(path)
    for height, width in ((24, 40), (96, 100), (48, 64)):
        ours = whole(path, size=(height, width))
        for before, after in zip(stored, ours, strict=True):
            for one, other in zip(before, after, strict=True):
                channel = Image.fromarray(one.numpy().astype(np.float32))
                theirs = np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC))
                assert np.abs(theirs.clip(0, 255) - other.numpy()).max() < 0.51


def turned(path, matrix):
    """Write a display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    values = np.array([a, b, 0, c, d, 0, 0, 0, 2**14]) * 2**16
    data[at : at + 36] = values.astype(">i4").tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "degrees, matrix",
    [(90, (0, -1, 1, 0)), (180, (-1, 0, 0, -1)), (270, (0, 1, -1, 0)), (0, (1, 0, 0, 1))],
)
def test_rotation_is_applied_as_the_matrix_says(tmp_path, degrees, matrix):
    still = next(moving(1, 48, 64))
    path = turned(
        write(tmp_path / "a.mp4", [still], "libx264rgb", "rgb24", options={"qp": "0"}), matrix
    )
    shown = whole(path)[0].permute(1, 2, 0).numpy()
    # ISO 14496-12: the pixel at (p, q) is shown at (a p + c q, b p + d q), up to a shift.
    a, b, c, d = matrix
    q, p = np.mgrid[:48, :64]
    x, y = a * p + c * q, b * p + d * q
    twin = np.zeros_like(shown)
    twin[y - y.min(), x - x.min()] = still
    assert probe(path).rotation == degrees
    assert (probe(path).height, probe(path).width) == twin.shape[:2] == shown.shape[:2]
    assert np.array_equal(shown, twin)


@pytest.mark.parametrize(
    "matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0.7071, 0.7071, -0.7071, 0.7071)]
)
def test_mirrors_and_odd_angles_are_refused(tmp_path, matrix):
    refused(turned(write(tmp_path / "a.mp4", numbered(1)), matrix), "a display matrix of")


@pytest.mark.parametrize(
    "name, codec, flags",
    [
        ("a.mp4", "libx264", "faststart"),
        ("a.mp4", "libx264", "frag_keyframe+empty_moov"),
        ("a.mkv", "libx264", None),
        ("a.webm", "libvpx", None),
    ],
)
def test_a_cut_file_is_refused_at_once(tmp_path, name, codec, flags):
    container = {"movflags": flags} if flags else {}
    options = FAST if codec == "libvpx" else {"g": "10"}
    path = write(tmp_path / name, moving(), codec, container=container, options=options)
    assert probe(path).frames == 40
    data, ends = path.read_bytes(), [place + size for place, size in packets_of(path)]
    for part in (0.2, 0.5, 0.75, 0.9, 0.97):
        cut = int(part * len(data))
        path.write_bytes(data[:cut])
        with pytest.raises(VideoError, match=r"cut short. Given \d+ whole frames before") as error:
            probe(path)
        if flags == "faststart":
            assert f"Given {sum(end <= cut for end in ends)} whole" in str(error.value)


def test_an_mp4_cut_between_two_frames_is_refused(tmp_path):
    container = {"movflags": "faststart"}
    path = write(tmp_path / "a.mp4", moving(), container=container, options={"bf": "0"})
    path.write_bytes(path.read_bytes()[: packets_of(path)[30][0]])
    refused(path, "Given 30 whole frames before")


def test_an_mp4_without_its_index_is_refused(tmp_path):
    path = write(tmp_path / "a.mp4", moving())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "Cannot read")


def damaged(path, start, length):
    data = bytearray(path.read_bytes())
    data[start : start + length] = bytes(length)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "mjpeg", "libsvtav1"])
def test_an_error_of_the_decoder_says_how_far_it_came(tmp_path, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / "a.mp4", moving(), codec, pix_fmt, options={})
    place, size = packets_of(path)[25]
    damaged(path, place + size // 2, size - size // 2)
    with pytest.raises(VideoError, match="of 40 whole frames before"):
        whole(path)


def test_a_hole_in_a_matroska_is_missed(tmp_path):
    """Its readers search on behind damage, so frames are gone and no error came."""
    container = {"cluster_time_limit": "200"}
    path = write(tmp_path / "a.mkv", moving(), "mjpeg", "yuvj420p", container=container)
    place, size = packets_of(path)[20]
    damaged(path, place - 16, size + 16)
    with av.open(str(path)) as opened:
        seen = [packet.pts for packet in opened.demux(video=0) if packet.size]
    assert len(seen) < 40 and seen[-1] == 1560
    refused(path, f"lacks frames, or its frame rate varies. Given {len(seen)} frames where", "40")


def copied(source, path, keep):
    """Copy the packets whose number is kept."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if keep(number):
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("group", [10, 100])
def test_a_missing_first_key_frame_is_refused(tmp_path, suffix, group):
    """Frames that lean on it cannot be shown, and without them all others would move up."""
    path = write(tmp_path / "a.mp4", moving(), options={"g": str(group), "bf": "0"})
    copy = copied(path, tmp_path / f"b.{suffix}", lambda number: number > 0)
    with pytest.raises(VideoError, match="39"):
        whole(copy)


def test_pictures_of_vp8_that_only_help_others_are_not_counted(tmp_path):
    path = write(tmp_path / "a.webm", moving(), "libvpx", options=FAST)
    with av.open(str(path)) as old, av.open(str(tmp_path / "b.webm"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            times, data = (packet.pts, packet.time_base), bytes(packet)
            packet.stream = stream
            new.mux(packet)
            if number == 20:
                unseen = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                unseen.pts = unseen.dts = times[0] + 1
                unseen.time_base, unseen.stream = times[1], stream
                new.mux(unseen)
    info = probe(tmp_path / "b.webm")
    assert (info.frames, info.hidden) == (40, 1)
    assert len(whole(info)) == 40


def test_a_change_of_size_on_the_way_is_refused(tmp_path):
    parts = [
        write(tmp_path / f"{size}.avi", numbered(3, size), "mjpeg", "yuvj420p") for size in (16, 32)
    ]
    with av.open(str(tmp_path / "a.avi"), "w") as new:
        stream, time = None, 0
        for part in parts:
            with av.open(str(part)) as old:
                stream = stream or new.add_stream_from_template(old.streams.video[0])
                for packet in (p for p in old.demux(video=0) if p.size):
                    packet.stream, packet.pts, packet.dts, time = stream, time, time, time + 1
                    new.mux(packet)
    refused(tmp_path / "a.avi", "16x16", "32x32", "from frame 3 on")


def silence(path, cover=False):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 16
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux([*sound.encode(frame), *sound.encode()])
        if cover:
            image = av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")
            container.mux([*picture.encode(image), *picture.encode()])
    return path


@pytest.mark.parametrize("cover", [False, True])
def test_sound_is_refused(tmp_path, cover):
    path = silence(tmp_path / "a.mp4", cover)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    refused(path, "streams", "'audio'")


def test_other_files_are_refused(tmp_path):
    texts = {"empty.mp4": b"", "text.mp4": b"no video\n" * 99, "list.m3u8": b"#EXTM3U\na.mp4\n"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "Cannot read")
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "png_pipe")
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.gif")
    refused(tmp_path / "a.gif", "gif")
    refused(tmp_path, "Is a directory")
    refused(tmp_path / "absent.mp4", "No such file")


@pytest.mark.parametrize(
    "name, codec, pix_fmt, word",
    [
        ("a.mov", "qtrle", "argb", "'argb'"),
        ("a.mov", "png", "rgba", "'rgba'"),
        ("a.mkv", "ffv1", "gray", "'gray'"),
    ],
)
def test_pixels_without_three_colours_are_refused(tmp_path, name, codec, pix_fmt, word):
    refused(write(tmp_path / name, numbered(2), codec, pix_fmt), word, "alpha, grey or a palette")


def test_alpha_beside_the_colours_of_a_webm_is_refused(tmp_path):
    path = write(tmp_path / "a.webm", numbered(2), "libvpx", options=FAST, tags={"alpha_mode": "1"})
    refused(path, "alpha")


def test_high_dynamic_range_and_unknown_matrices_are_refused(tmp_path):
    refused(write(tmp_path / "a.mp4", numbered(2), colours={"color_trc": 16}), "PQ")
    refused(write(tmp_path / "b.mp4", numbered(2), colours={"colorspace": 8}), "colour matrix 8")


@pytest.mark.parametrize("wrong", [{"block": 0}, {"size": (0, 8)}])
def test_pieces_of_nothing_are_refused_before_reading(wrong):
    with pytest.raises(ValueError, match=r"block .* and size"):
        read("never opened", **wrong)


def test_names_that_look_like_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a:b.mp4", numbered(2))
    assert probe("a:b.mp4").frames == 2


def test_examples_run():
    result = doctest.testmod(videos)
    assert result.attempted and not result.failed
