"""The plain data that policy parts return. Only the store moves tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

PerHead = Tensor | list[Tensor]
"""One tensor for all heads of a layer, or a list with one tensor per head (ragged)."""


@dataclass(frozen=True)
class Selection:
    """What the queries of one layer of one sample read in one pass.

    Give ``frames`` where whole frames are chosen, ``rows`` otherwise. Q is the number of query
    frames, or 1 where all of them read the same.

    Args:
        frames: bool ``[H, Q, F]`` over the view's ``frame_ids``.
        rows: Per head bool ``[Q, N_h]`` over its committed rows, or ``[Q, N_h + P]`` to address the
            P provisional rows too.
        current: bool ``[H, Q, frames in flight]``: which provisional frames are read (with
            ``frames``); all where not given.
        bias: Per head float ``[Q, N_h + P]`` added to the logits.
    """

    frames: Tensor | None = None
    rows: PerHead | None = None
    current: Tensor | None = None
    bias: PerHead | None = None


@dataclass(frozen=True)
class Merge:
    """New rows as sparse weighted sums of old rows. One source may feed several targets.

    E is the number of (source, target) pairs, R the number of new rows.

    Args:
        source: int64 ``[E]`` old row.
        target: int64 ``[E]`` new row, 0 to R - 1.
        coefficient: ``[E]``; used as given, not normalised.
        frame_id: ``[R]`` where the new row counts as coming from.
        time: ``[R]`` its rotary time; may be fractional.
        place: ``[R]`` its position in the frame.
        weight: ``[R]`` tokens it stands for; the sum over its sources where not given.
        align: ``raw`` sums keys before rotation; ``relative`` turns each source by its distance to
            the target first, which is a sum of rotated keys.
        correction: ``[R, D]`` added to the new key, before rotation.
    """

    source: Tensor
    target: Tensor
    coefficient: Tensor
    frame_id: Tensor
    time: Tensor
    place: Tensor
    weight: Tensor | None = None
    align: Literal["raw", "relative"] = "raw"
    correction: Tensor | None = None


@dataclass(frozen=True)
class Retention:
    """What stays in memory, for one layer of one sample. Rows are named by index, per head.

    Args:
        keep: Rows that stay; all where not given. Order and repeats do not matter.
        merge: New rows; one for all heads or one (or None) per head.
        time: New rotary time of the kept rows, in ascending order of their old index. Where keys
            are held rotated, kept rows that have a codec are decoded by it.
        write: Column values, per head ``[N_h]``, written to the old rows before anything else.
        archive: Rows copied to the archive (held and counted, not read).
        restore: Rows of the archive that come back to memory and leave the archive.
        restore_time: Their rotary time, in the order of ``restore``; unchanged where not given.
        restore_copy: The restored rows also stay in the archive.
        discard: Rows of the archive to forget.
    """

    keep: PerHead | None = None
    merge: Merge | list[Merge | None] | None = None
    time: PerHead | None = None
    write: dict[str, PerHead] = field(default_factory=dict)
    archive: PerHead | None = None
    restore: PerHead | None = None
    restore_time: PerHead | None = None
    restore_copy: bool = False
    discard: PerHead | None = None


@dataclass(frozen=True)
class Rebuild:
    """Forget memory and archive, and run the model over past clean latents again.

    Args:
        frames: Ids of the frames to encode again, ascending.
        prompt: At a prompt switch, encode under the ``new`` prompt or the ``old`` one.
        times: Their rotary times; the frame ids where not given.
        hold: Which of these frames stay in memory in the end; all where not given.
        spare: Frames whose rows are not forgotten but put aside, unread while the others are
            encoded, and put back in front of them.
    """

    frames: tuple[int, ...]
    prompt: Literal["new", "old"] = "new"
    times: tuple[float, ...] | None = None
    hold: tuple[int, ...] | None = None
    spare: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recode:
    """Which committed rows get which codec, for one layer of one sample.

    Args:
        codec: Name of a codec (see :mod:`lightning_kv.cache.codecs`).
        rows: Per head int64 indices of rows to store with it; rows already stored with a codec
            stay as they are.
    """

    codec: str
    rows: PerHead


@dataclass(frozen=True)
class Event:
    """Something that happens between two chunks.

    Args:
        kind: ``start``, ``prompt_switch`` or ``scene_cut``.
        frame: First frame after it.
        prompt: The prompt from here on, for ``prompt_switch``.
    """

    kind: Literal["start", "prompt_switch", "scene_cut"]
    frame: int = 0
    prompt: str | None = None
