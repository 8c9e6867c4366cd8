"""The plain data that policy parts return. Only the store moves tensors.

Rows are named by masks over the table that the part was shown (:class:`.table.CacheView`): H heads
(or 1 where all heads agree), Q query frames (or 1 where all of them read the same), N rows of the
table, A rows of the archive, F frames, P rows of the frames in flight, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What the queries of one layer of one sample read.

    Give ``frames`` where whole frames are chosen, ``rows`` otherwise.

    Args:
        frames: bool ``[1 or H, 1 or Q, F]`` over the view's ``frame_ids``; or the ids themselves
            where all heads and queries read the same frames.
        rows: bool ``[1 or H, 1 or Q, N]``.
        current: Which of the frames in flight are read: bool ``[1 or H, 1 or Q, frames]``, or
            ``[1 or H, 1 or Q, P]`` for single rows; all where not given.
        bias: float ``[1 or H, 1 or Q, N + P]`` added to the logits.
        count: History frames that each stream reads, where the host knows it: one number, or one
            for each head. Then making the plan waits for nothing.
        rank: int64, shaped as the mask: the place of what is chosen in some order, for positions.
    """

    frames: Tensor | tuple[int, ...] | None = None
    rows: Tensor | None = None
    current: Tensor | None = None
    bias: Tensor | None = None
    count: int | tuple[int, ...] | None = None
    rank: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """New rows as sparse weighted sums of old rows. One source may feed several targets.

    E is the number of (source, target) pairs, R the number of new rows. Heads with fewer pairs or
    new rows than others fill up with ``source`` -1 and ``frame_id`` -1. A row that comes back from
    the archive, or a copy at another time, is a sum of one source with coefficient 1.

    Args:
        source: int64 ``[1 or H, E]``: a row of memory, 0 to N - 1, or N + a row of the archive.
        target: int64 ``[1 or H, E]``: a new row, 0 to R - 1.
        coefficient: ``[1 or H, E]``; used as given, not normalised.
        frame_id: int64 ``[1 or H, R]``: the held or archived frame the new row counts for.
        time: ``[1 or H, R]`` its rotary time; may be fractional.
        place: ``[1 or H, R, 2]`` its row and column in the frame; may be fractional.
        weight: ``[1 or H, R]`` tokens it stands for; the sum over its sources where not given.
        align: ``raw`` sums keys before rotation; ``relative`` turns each source by its distance to
            the target first, which is a sum of rotated keys.
        correction: ``[1 or H, R, D]`` added to the new key, before rotation.
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
class Match:
    """Draw rows towards others: mean and deviation per head and channel, of keys and values.

    ``x' = (1 - share) x + share (s_like (x - m_rows) / s_rows + m_like)``, with population
    deviations of at least 1e-6; keys before rotation (TAME in TetherCache, arXiv 2606.13035). It is
    carried out on the rows of each namespace with their own statistics.

    Args:
        rows: bool ``[1 or H, N]``: what is changed.
        like: bool ``[1 or H, N]``: what it is drawn to.
        share: How far, 0 to 1.
        keys: Change keys.
        values: Change values.
    """

    rows: Tensor
    like: Tensor
    share: float = 1.0
    keys: bool = True
    values: bool = True


@dataclass(frozen=True)
class Retention:
    """What stays in memory, for one layer of one sample. Carried out in the order of the fields.

    Args:
        write: Column values ``[1 or H, N]``, by name.
        match: Rows drawn towards others, one after the other.
        time: New rotary time ``[1 or H, N]``. Where keys are held rotated, rows with a codec are
            decoded by it.
        place: New row and column ``[1 or H, N, 2]``.
        weight: Tokens that rows stand for, ``[1 or H, N]``.
        sums: New rows from the old ones, behind the kept rows.
        archive: bool ``[1 or H, N]``: rows copied to the archive (held and counted, not read).
        discard: bool ``[1 or H, A]``: rows of the archive to forget, once they have been summed.
        keep: bool ``[1 or H, N]``: rows that stay; all where not given.
    """

    write: dict[str, Tensor] = field(default_factory=dict)
    match: tuple[Match, ...] = ()
    time: Tensor | None = None
    place: Tensor | None = None
    weight: Tensor | None = None
    sums: Sums | None = None
    archive: Tensor | None = None
    discard: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True)
class Rebuild:
    """Forget memory and archive, and run the model over past clean latents again.

    Args:
        frames: Ids of the frames to encode again, ascending.
        prompt: At a prompt switch, encode under the ``new`` prompt or the ``old`` one.
        times: Their rotary times; the frame ids where not given.
        hold: Which of these frames stay in memory in the end; all where not given.
        spare: Frames whose rows are not forgotten but put aside, and put back in front of the
            others once these are encoded.
        together: Encode all frames in one pass, in which each reads all others; chunk by chunk,
            each reading those before it, where not.
        read: The rows of ``spare`` are read while the others are encoded.
    """

    frames: tuple[int, ...]
    prompt: Literal["new", "old"] = "new"
    times: tuple[float, ...] | None = None
    hold: tuple[int, ...] | None = None
    spare: tuple[int, ...] = ()
    together: bool = False
    read: bool = False

    def passes(self, chunk: int) -> list[slice]:
        """Which of the frames are encoded in one pass, pass by pass.

        Args:
            chunk: Frames of a chunk.
        """
        size = max(1, len(self.frames)) if self.together else chunk
        return [slice(low, low + size) for low in range(0, len(self.frames), size)]


@dataclass(frozen=True)
class Recode:
    """Which committed rows get which codec, for one layer of one sample.

    Args:
        codec: Name of a codec (see :mod:`lightning_kv.cache.codecs`).
        rows: bool ``[1 or H, N]``: rows to store with it; rows already stored with a codec stay as
            they are.
    """

    codec: str
    rows: Tensor


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
