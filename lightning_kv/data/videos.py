"""Video files, read in pieces: pixels as they are shown, or a reason why not.

Colours follow what the file declares. YUV that declares no matrix is taken as BT.601 at every size,
and YUV that declares no range as limited: that is what swscale, and so ffmpeg, imageio, OpenCV and
torchvision, wrote into it. Chroma is upsampled bilinearly at its declared site and rounded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from lightning_kv.data.tars import Member

VideoFile = Path | Member
"""A video: a file, or a member of a tar."""
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
CONTAINERS = ("mov", "matroska", "avi")  # demuxers; others also open texts, images and playlists
# Colour matrix as H.273 numbers it: its name, and what swscale calls it.
MATRICES = {
    1: ("bt709", Colorspace.ITU709),
    2: ("bt601 (assumed)", Colorspace.ITU601),
    4: ("fcc", Colorspace.FCC),
    5: ("bt601", Colorspace.ITU601),
    6: ("bt601", Colorspace.ITU601),
    7: ("smpte240m", Colorspace.SMPTE240M),
    9: ("bt2020", 9),  # older releases of PyAV have no name for it
}
HIGH_DYNAMIC_RANGE = {16: "PQ", 18: "HLG"}  # transfer curves, as H.273 numbers them
# The part a, b, c, d of a display matrix: degrees that the picture is turned counterclockwise.
ROTATIONS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 90, (-1, 0, 0, -1): 180, (0, 1, -1, 0): 270}
HALF = Fraction(1, 2)  # of a frame: containers round times
# Without these flags swscale truncates, and repeats chroma instead of interpolating it.
EXACT = (
    Interpolation.BILINEAR.value
    | 0x40000  # SWS_ACCURATE_RND
    | 0x2000  # SWS_FULL_CHR_H_INT
    | 0x80000  # SWS_BITEXACT
)


class VideoError(ValueError):
    """A file that cannot be read as a video, or not to its end; or two that do not match."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Args:
        path: The file, or the member of a tar.
        width: Pixels across, as shown (after rotation). Pixels are taken as square.
        height: Pixels down, as shown.
        fps: Frames per second, on average.
        frames: Pictures stored to be shown.
        hidden: Pictures stored that are not to be shown, such as those that an edit list cuts off.
        rotation: Degrees by which stored pictures are turned counterclockwise to be shown.
        codec: Name of the codec, such as ``"h264"``.
        pixel_format: Format of the stored pixels, such as ``"yuv420p10le"``.
        bits: Bits per component as stored; more than 8 are rounded to 8.
        matrix: Colour matrix; ``"rgb"`` where nothing needs converting.
        full_range: Whether 0 is black and the largest value white.
    """

    path: VideoFile
    width: int
    height: int
    fps: Fraction
    frames: int
    hidden: int
    rotation: int
    codec: str
    pixel_format: str
    bits: int
    matrix: str
    full_range: bool

    @property
    def source(self) -> str:
        """Where the pixels come from, as results record it."""
        return f"decoded:{self.codec}"


def _file(path: str | VideoFile) -> VideoFile:
    return path if isinstance(path, Member) else Path(path)


def probe(path: str | VideoFile) -> VideoInfo:
    """Say what a video file holds, after walking through it; only its first frame is decoded.

    Of several video streams the first counts. A file made to be cut anywhere (a live recording:
    Matroska without a duration, fragments of mp4) cannot always be seen to end early.

    Args:
        path: A file of one of the kinds in ``SUFFIXES``, or such a member of a tar; what it holds
            counts, not its name.

    Returns:
        Its size, rate, count of frames and colours.

    Raises:
        VideoError: It is no such file, it ends early, or its pixels cannot be shown as RGB (alpha,
            grey, palettes, high dynamic range, a turn by no right angle).

    Example:
        >>> probe("no/such.mp4")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_kv.data.videos.VideoError: Cannot read no/such.mp4. Given 'No such file or ...
    """
    path = _file(path)
    with _opened(path) as (container, stream):
        first, shown, hidden = _walk(path, container, stream)
        return _described(path, stream, first, shown, hidden)


def read(
    video: str | VideoFile | VideoInfo, block: int = 8, size: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """Read a video in presentation order, a few frames at a time.

    Where frames are lost or the decoder finds an error, reading stops with an error; no frame is
    left out or repeated. Damage that still decodes (most codecs have no checksums) is not seen.

    Args:
        video: The file or member, or what :func:`probe` said about it.
        block: Frames in a piece; the last may have fewer. No more are held.
        size: Height and width (pixels) to resize to: bicubic with antialias, rounded. None: as
            shown.

    Yields:
        uint8 ``[f, 3, H, W]``, RGB.

    Raises:
        VideoError: As :func:`probe`; and while reading, where the data is damaged.
        ValueError: The block or the size is not positive.
    """
    if block < 1 or (size is not None and min(size) < 1):
        raise ValueError(
            f"Nothing can be read in such pieces. Given block {block} and size {size}. Give a "
            "block of 1 frame or more, and a height and width of 1 pixel or more."
        )
    return _blocks(video if isinstance(video, VideoInfo) else probe(video), block, size)


def _blocks(info: VideoInfo, block: int, size: tuple[int, int] | None) -> Iterator[Tensor]:
    pictures = _pictures(info)
    while piece := list(islice(pictures, block)):
        pixels = torch.from_numpy(np.stack(piece)).permute(0, 3, 1, 2)
        pixels = torch.rot90(pixels, info.rotation // 90, (-2, -1))
        yield pixels.contiguous() if size in (None, pixels.shape[-2:]) else _resized(pixels, size)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    scaled = torch.nn.functional.interpolate(
        pixels.float(), size, mode="bicubic", align_corners=False, antialias=True
    )
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def _pictures(info: VideoInfo) -> Iterator[NDArray[np.uint8]]:
    """Every picture as stored, RGB ``[H, W, 3]``."""
    done, stored, convert = 0, None, VideoReformatter()
    with _opened(info.path) as (container, stream):
        try:
            for packet in container.demux(stream):
                for frame in packet.decode():
                    size, matrix = f"{frame.width}x{frame.height}", int(frame.colorspace)
                    kind = f"{size} {frame.format.name} (matrix {matrix})"
                    stored = stored or kind
                    if kind != stored:
                        raise _refused(info.path, f"{stored}, then {kind} from frame {done} on")
                    yield _rgb(convert, frame)
                    done += 1
        except av.error.FFmpegError as error:
            raise _damaged(info.path, f"{done} of {info.frames}", error.strerror) from error
    if done != info.frames:
        raise _damaged(info.path, f"{done} of {info.frames}", "the end")


def _rgb(convert: VideoReformatter, frame: VideoFrame) -> NDArray[np.uint8]:
    colours = {}
    if not frame.format.is_rgb:
        colours = {
            "src_colorspace": MATRICES[int(frame.colorspace)][1],
            "src_color_range": ColorRange.JPEG if _is_full(frame) else ColorRange.MPEG,
            "dst_color_range": ColorRange.JPEG,
        }
    return convert.reformat(frame, format="rgb24", interpolation=EXACT, **colours).to_ndarray()


@contextmanager
def _opened(path: VideoFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    with ExitStack() as stack:
        try:
            # A relative "a:b.mp4" would be taken for a protocol.
            member = isinstance(path, Member)
            source = stack.enter_context(path.open()) if member else str(path.absolute())
            container = stack.enter_context(av.open(source))
        except (av.error.FFmpegError, OSError) as error:
            raise _refused(path, repr(error.strerror)) from error
        if container.format.name.split(",")[0] not in CONTAINERS:
            raise _refused(path, f"the format {container.format.name!r}")
        cover = Disposition.attached_pic
        videos = [one for one in container.streams.video if not one.disposition & cover]
        if not videos or videos[0].codec_context is None:
            kinds = [stream.type for stream in container.streams]
            raise _refused(path, f"streams {kinds}, none of them a video that can be decoded")
        # Otherwise damage is painted over with what was there before.
        videos[0].codec_context.options = {"err_detect": "explode"}
        yield container, videos[0]


def _walk(
    path: VideoFile, container: InputContainer, stream: VideoStream
) -> tuple[VideoFrame | None, int, int]:
    """The first frame, and how many pictures are stored to be shown and hidden."""
    first, shown, hidden, end = None, 0, 0, 0
    usual = 1 / (stream.average_rate * stream.time_base) if stream.average_rate else 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, f"{shown}", "a picture that is not whole")
            if first is None:
                first = next(iter(packet.decode()), None)
            if _is_hidden(packet):
                hidden += 1
            elif packet.size:
                shown += 1
                start = packet.dts if packet.pts is None else packet.pts
                end = max(end, (start or 0) + (packet.duration or usual))
    except av.error.FFmpegError as error:
        raise _damaged(path, f"{shown}", error.strerror) from error
    if container.format.name.startswith("mov"):
        _check_boxes(path, shown)
    _check_length(path, container, stream, shown, end)
    return first, shown, hidden


def _is_hidden(packet: Packet) -> bool:
    """Whether a picture is not to be shown: cut off, or made only to be predicted from."""
    alone = packet.stream.codec_context.codec.canonical_name == "vp8" and packet.size > 0
    return packet.is_discard or (alone and not bytes(packet)[0] & 0x10)  # RFC 6386, 9.1


def _check_boxes(path: VideoFile, shown: int) -> None:
    """Refuse an mp4 or mov whose last box (ISO 14496-12, 4.2) goes on beyond the file."""
    at = 0
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        while at < size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length == 0:  # to the end of the file, however long
                return
            at += length
    if at > size:
        raise _damaged(path, f"{shown}", f"{at} bytes")


def _check_length(
    path: VideoFile, container: InputContainer, stream: VideoStream, shown: int, end: Fraction
) -> None:
    """Refuse a file that ends before its head says, or that has a hole."""
    name, rate = container.format.name, stream.average_rate
    declared = _declared_end(container, stream)
    if not declared or not rate:
        return
    if (declared - end * stream.time_base) * rate > HALF:
        raise _damaged(path, f"{shown}", f"the end at {float(declared):.3f} s")
    # Readers of AVI and Matroska search on behind damage without a word. Matroska counts no frames.
    begin = (stream.start_time or 0) * stream.time_base
    count = {"avi": stream.frames, "matroska,webm": round((declared - begin) * rate)}.get(name, 0)
    if shown < count:
        raise VideoError(
            f"{path} lacks frames, or its frame rate varies. Given {shown} frames where its head "
            f"makes it {count}. Copy it again from where it came, or encode it at a constant rate."
        )


def _declared_end(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """When the video ends by what the file's head says, in seconds; None where it says nothing."""
    if stream.duration is not None:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    if "DURATION" in stream.metadata:  # Matroska: 00:00:05.000000000
        hours, minutes, seconds = map(Fraction, stream.metadata["DURATION"].strip("\0").split(":"))
        return hours * 3600 + minutes * 60 + seconds
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None


def _described(
    path: VideoFile, stream: VideoStream, first: VideoFrame | None, shown: int, hidden: int
) -> VideoInfo:
    rate = stream.average_rate or stream.guessed_rate
    if first is None or not rate:
        raise _refused(path, f"{shown} pictures at rate {rate}, of which none could be decoded")
    _check_pixels(path, first, stream)
    rotation, rgb = _rotation(path, first), first.format.is_rgb
    turned = rotation % 180 != 0
    return VideoInfo(
        path=path,
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        fps=Fraction(rate),
        frames=shown,
        hidden=hidden,
        rotation=rotation,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=first.format.name,
        bits=max(component.bits for component in first.format.components),
        matrix="rgb" if rgb else MATRICES[int(first.colorspace)][0],
        full_range=rgb or _is_full(first),
    )


def _check_pixels(path: VideoFile, frame: VideoFrame, stream: VideoStream) -> None:
    """Refuse pixels that have no plain way to 8-bit RGB."""
    layout, curve = frame.format, int(stream.codec_context.color_trc)
    webm_alpha = stream.metadata.get("alpha_mode") or stream.metadata.get("ALPHA_MODE")
    if layout.has_palette or len(layout.components) != 3 or webm_alpha == "1":
        raise _refused(path, f"pixels {layout.name!r} (alpha, grey or a palette)")
    if not layout.is_rgb and int(frame.colorspace) not in MATRICES:
        raise _refused(path, f"colour matrix {int(frame.colorspace)} of H.273")
    if curve in HIGH_DYNAMIC_RANGE:
        raise _refused(path, f"high dynamic range ({HIGH_DYNAMIC_RANGE[curve]})")


def _rotation(path: VideoFile, frame: VideoFrame) -> int:
    try:
        data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError as error:  # PyAV does not know every kind that FFmpeg knows
        raise _refused(path, f"side data of an unknown kind ({error})") from error
    if data is None:
        return 0
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5] / 2**16
    if (a, b, c, d) not in ROTATIONS:
        raise _refused(path, f"a display matrix of {a:g}, {b:g}, {c:g}, {d:g}")
    return ROTATIONS[a, b, c, d]


def _is_full(frame: VideoFrame) -> bool:
    return int(frame.color_range) == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def _damaged(path: VideoFile, found: str, instead: str | None) -> VideoError:
    return VideoError(
        f"{path} is damaged or cut short. Given {found} whole frames before {instead!r}. Copy the "
        "file again from where it came, or encode it again."
    )


def _refused(path: VideoFile, given: str) -> VideoError:
    return VideoError(
        f"Cannot read {path}. Given {given}. Give a whole video in mp4, mov, mkv, webm or avi, "
        "without alpha, in colour, of standard dynamic range and turned by right angles at most."
    )
