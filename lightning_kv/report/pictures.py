"""Pictures of memory: which past frames a head keeps and reads, chunk by chunk.

A panel is one head: a column for every frame of the clip, a line for every frame that was denoised
(a chunk is as many lines as it has frames, so what each query frame reads can be told apart).
White is a past frame that is gone, a light hue is held, a strong hue is read. Blue rows are as
they were computed; the more a row stands for others that were merged into it, the more orange it
is. The chunk's own frames are grey, frames that do not exist yet are transparent.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Trace = dict[str, NDArray]
Pixels = NDArray[np.uint8]

GONE = (255, 255, 255)
OWN = (158, 163, 172)
HELD, READ = (190, 217, 245), (20, 83, 176)  # as computed
MERGED_HELD, MERGED_READ = (253, 214, 160), (200, 84, 8)
ROUNDING = 1.5 / 255  # frames: `held` is stored as whole 255ths
GAP = 3  # cells between the panels of a strip


def panels(trace: Trace, layer: int, only: int | None = None) -> NDArray[np.float32]:
    """Panels of all heads of one layer as colours.

    Args:
        trace: ``held``, ``read`` and ``weight``, see :mod:`lightning_kv.cache.trace`.
        layer: Which layer.
        only: Number of a chunk, to have its lines alone.

    Returns:
        float32 ``[H, lines, F, 4]``, RGBA in 0 to 255.
    """
    chunk, rows = chunk_frames(trace), np.s_[:] if only is None else np.s_[only : only + 1]
    read = trace["read"][rows, :, layer].astype(np.float32) / 255  # [C, Q, H, F]
    if read.shape[1] != chunk:  # all query frames of a chunk read the same
        read = np.broadcast_to(read.mean(1, keepdims=True), (len(read), chunk, *read.shape[2:]))
    read = read.transpose(2, 0, 1, 3).reshape(read.shape[2], -1, read.shape[3])
    held, weight = (
        trace[name][rows, layer].astype(np.float32).transpose(1, 0, 2).repeat(chunk, axis=1)
        for name in ("held", "weight")
    )
    colours = _colours(held / 255, read, weight)
    lines, frames = np.indices(colours.shape[1:3])
    first = (lines // chunk + (only or 0)) * chunk  # of the frames that are being denoised
    colours[:, (frames >= first) & (frames < first + chunk)] = (*OWN, 255)
    colours[:, frames >= first + chunk] = 0
    return colours[:, : colours.shape[2]]


def chunk_frames(trace: Trace) -> int:
    """Frames of a chunk."""
    chunks, frames = trace["held"].shape[0], trace["held"].shape[-1]
    return -(-frames // chunks)


def overview(trace: Trace) -> Pixels:
    """The mean panel over all layers and heads, uint8 ``[lines, F, 4]``."""
    layers = range(trace["held"].shape[1])
    return _whole(np.mean([panels(trace, layer).mean(0) for layer in layers], axis=0))


def strip(trace: Trace, layer: int) -> Pixels:
    """One layer from left to right: the mean over its heads, then every head."""
    each = panels(trace, layer)
    row = [each.mean(0), *each] if len(each) > 1 else [*each]
    gap = np.zeros((each.shape[1], GAP, 4), np.float32)
    return _whole(np.concatenate([part for p in row for part in (p, gap)][:-1], axis=1))


def close_up(trace: Trace, chunk: int) -> Pixels:
    """One chunk of all layers and heads: a head is a band of a line per query frame.

    Bands of a layer stand together, a gap parts it from the next; frames after the chunk are cut.
    """
    size = chunk_frames(trace)
    bands = []
    for layer in range(trace["held"].shape[1]):
        each = panels(trace, layer, chunk)[:, :, : (chunk + 1) * size]
        line = np.zeros((1, each.shape[2], 4), np.float32)
        bands += [part for head in each for part in (head, line)] + [line]
    return _whole(np.concatenate(bands[:-2]))


def describe(trace: Trace) -> str:
    """In a few words: what a head keeps and reads of the past in the last chunk."""
    last = chunk_frames(trace) * (len(trace["held"]) - 1)
    held, weight = (trace[name][-1, ..., :last].astype(np.float32) for name in ("held", "weight"))
    read = trace["read"][-1, ..., :last].astype(np.float32)
    kept, used = (_count(float(x.sum(-1).mean()) / 255) for x in (held, read))
    text = f"keeps {kept} of {last} past frames, reads {used}"
    if bool((_merged(held / 255, weight) > 0).any()):
        text += f"; what is kept stands for {_count(float(weight.sum(-1).mean()))}"
    if _differ(held):
        text += "; heads keep different ones"
    elif _differ(read):
        text += "; heads read different ones"
    if query_frames_differ(trace):
        text += "; query frames read different ones"
    return text


def heads_differ(trace: Trace) -> bool:
    """Whether the heads of some layer keep or read different frames."""
    return _differ(trace["held"]) or _differ(trace["read"])


def query_frames_differ(trace: Trace) -> bool:
    """Whether the query frames of some chunk read different frames."""
    read = trace["read"]
    return bool((read != read[:, :1]).any())


def png(pixels: Pixels) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _colours(held: NDArray, read: NDArray, weight: NDArray) -> NDArray[np.float32]:
    """Opaque colours of cells: from white over light to strong, from blue to orange."""
    merged = _merged(held, weight)[..., None]
    light, strong = (
        np.float32(plain) * (1 - merged) + np.float32(other) * merged
        for plain, other in ((HELD, MERGED_HELD), (READ, MERGED_READ))
    )
    held, read = held[..., None], read[..., None]
    base = np.float32(GONE) * (1 - held) + light * held
    colours = base * (1 - read) + strong * read
    return np.concatenate([colours, np.full_like(colours[..., :1], 255)], axis=-1)


def _merged(held: NDArray, weight: NDArray) -> NDArray:
    """0 where rows stand for themselves, 1 where they stand for twice their number or more."""
    extra = weight - held
    return np.where(
        (extra > ROUNDING) & (held > 0), np.minimum(extra / np.maximum(held, ROUNDING), 1), 0
    ).astype(np.float32)


def _differ(shares: NDArray) -> bool:
    """Whether the heads of a layer, the axis before the last, differ."""
    return bool((shares != shares[..., :1, :]).any())


def _count(frames: float) -> str:
    return f"{frames:.0f}" if abs(frames - round(frames)) < 0.05 else f"{frames:.1f}"


def _whole(colours: NDArray) -> Pixels:
    return np.rint(colours).astype(np.uint8)
