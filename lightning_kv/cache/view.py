"""What a policy part may look at: a table of rows, and the pass that is asked about. Read-only.

Shapes: H heads, N rows of the longest head, F frames, P rows of the frames in flight, Q frames of
the query, T tokens of the query, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.store import LayerStore
from lightning_kv.cache.table import BLOCK, Table


class CacheView(Table):
    """The memory of one layer of one sample between two passes.

    Args:
        store: Of the layer.
        layer: Its layer.
        step: The pass that has just ended, or is about to begin.
        sample: Index of the sample.
        key: Its prompt key.
        seed: Base of every random draw of this sample.
        tables: What the caller gave for declared needs, by name.
        inputs: Side inputs by frame, by name.
        log_weight: Whether merged rows count for their weight in attention.
        fixed_bytes: Bytes of the sample's cache that are no rows of memory.
        old_row_bytes: What a row and head costs in the codec it ends in, and after how many frames.
        look_ahead: Makes the view of the next chunk, see :meth:`ahead`.
    """

    query: Tensor | None = None

    def __init__(
        self,
        store: LayerStore,
        layer: int,
        step: Pass,
        sample: int = 0,
        key: str | None = None,
        seed: int = 0,
        tables: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        log_weight: bool = False,
        fixed_bytes: Callable[[], int] = lambda: 0,
        old_row_bytes: tuple[float, int] | None = None,
        look_ahead: Callable[[CacheView], CacheView] | None = None,
    ) -> None:
        super().__init__(store.memory, store.frames, store.geometry, store.rotated, store.whole)
        self._store, self.layer, self.step = store, layer, step
        self.sample, self.key, self.seed = sample, key, seed
        self.tables, self.inputs = tables or {}, inputs or {}
        self.log_weight = log_weight and store.weighted
        self._fixed_bytes, self._look_ahead = fixed_bytes, look_ahead
        self.old_row_bytes = old_row_bytes
        self.lag: Tensor | None = None
        self.scored = 0  # keys touched to score them, times the queries that touched them
        self.doubts: list[tuple[Tensor, str]] = []

    @property
    def clean(self) -> bool:
        """Whether the newest rows were made from clean latents."""
        return self.step.clean

    @property
    def query_frames(self) -> int:
        """Number Q of frames of the pass."""
        return len(self.step.frames)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of state, modules and archive in this namespace; they are no rows of memory."""
        return self._fixed_bytes()

    @property
    def version(self) -> int:
        """Changes whenever committed rows do: what was made of them before is stale."""
        return self._store.version

    @property
    def stamp(self) -> tuple[Any, ...]:
        """Changes whenever rows do, or the times at which they are read: for what is remembered."""
        still = self.lag is None
        return (self.version, *(() if still else (self.step.query_times, self.query_frames)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that parts have declared."""
        return tuple(self._store.columns)

    @cached_property
    def archive(self) -> Table:
        """Rows held aside, unread; keys ``read`` are those at their recorded times."""
        return self._store.shelf

    def shown(self) -> list[Tensor]:
        """Tensors of the pass itself that a part is shown; it must not write to them."""
        return []

    def doubt(self, wrong: Tensor, what: str) -> None:
        """Report a fault that only the device knows; it is raised when the host next reads.

        Args:
            wrong: One truth value.
            what: What is wrong, what was given and what would work.
        """
        self.doubts.append((wrong, what))

    def ahead(self) -> CacheView:
        """The same memory as the next chunk will meet it, for a decision between two passes.

        Its keys ``read`` are those that the next chunk's queries will find, and its ``step`` says
        where that chunk stands; there are no queries yet.

        Raises:
            ValueError: Asked in the middle of a pass.
        """
        if self._look_ahead is None:
            raise ValueError(
                "A look at the next chunk was asked for in the middle of a pass. "
                "Ask when a chunk is committed, or at an event."
            )
        return self._look_ahead(self)

    @property
    def read_time(self) -> Tensor:
        """The rotary time at which each row is read, ``[1 or H, N]`` or ``[1 or H, Q, N]``."""
        if self.lag is None:
            return self.time
        if self.lag.shape[1] == 1:
            return self.step.query_times[0] - self.lag[:, 0]
        own = upload(self.step.query_times, self._like, torch.float32)
        return own.unsqueeze(-1) - self.lag

    def keys_at(self, query: int) -> Tensor:
        """Keys ``[H, N, D]`` as one frame of the query meets them."""
        if self.lag is None or self.lag.shape[1] == 1:
            return self.keys("read")
        return self._turned(self._payload("k"), self.read_time[:, query], 1)

    def _read_times(self) -> Tensor | None:
        if self.lag is None:
            return None
        times = self.read_time
        return times if times.ndim == 2 else times[:, 0]  # as the first query frame meets them


class PassView(CacheView):
    """The memory of one layer of one sample while a pass runs.

    Args:
        query: ``[H, T, D]`` after rotation.
        raw_query: The same before rotation.
        own: Keys ``read`` and ``raw``, and ``value`` of the frames in flight, each ``[H, P, D]``.
        settings: See :class:`CacheView`.
    """

    def __init__(
        self, query: Tensor, raw_query: Tensor, own: dict[str, Tensor], **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.query, self.raw_query, self._own = query, raw_query, own
        self.selection: Selection | None = None
        self.output: Tensor | None = None
        self.read: tuple[Tensor | None, Tensor | None] = (None, None)

    def shown(self) -> list[Tensor]:
        """See :class:`CacheView`."""
        every = (self.query, self.raw_query, *self._own.values())
        return [x for x in every if not x.is_inference()]

    @property
    def flight(self) -> int:
        """Number P of rows of the frames in flight."""
        return self.query.shape[1]

    def own_keys(self, name: Literal["raw", "read"] = "read") -> Tensor:
        """Keys of the frames in flight ``[H, P, D]``."""
        return self._own[name]

    def own_values(self) -> Tensor:
        """Values of the frames in flight ``[H, P, D]``."""
        return self._own["value"]

    @property
    def final(self) -> slice:
        """Which of the P rows become permanent after this pass; empty while denoising."""
        return self.step.final_rows(self.geometry.tokens)

    def joint(self, held: Tensor, own: Tensor) -> Tensor:
        """Values of held rows and of those behind them, where they lie once these are committed.

        Args:
            held: ``[1 or H, N, ...]``.
            own: ``[1 or H, n, ...]``.

        Returns:
            ``[1 or H, N + n, ...]``.
        """
        lines = max(len(held), len(own), self.heads if self.ragged else 1)
        held, own = (x.expand(lines, *x.shape[1:]) for x in (held, own))
        every = torch.cat([held, own], dim=1)
        if not self.ragged:
            return every
        lengths = upload(self.lengths, self._like, torch.int64).unsqueeze(1)
        place = torch.arange(every.shape[1], device=every.device).expand(lines, -1)
        behind = place - lengths
        inside = (behind >= 0) & (behind < own.shape[1])
        index = torch.where(inside, behind + held.shape[1], place.clamp_max(every.shape[1] - 1))
        index = index.view(*index.shape, *(1,) * (every.ndim - 2)).expand_as(every)
        return every.gather(1, index)

    @cached_property
    def joint_keys(self) -> Tensor:
        """Keys as read of held rows and of those in flight, ``[H, N + P, D]``."""
        groups, store = self._rows.groups, self._store
        written = store.flight == self.flight and store.own is None and self.step.mode == "run"
        if written and self.lag is None and self._rotated and len(groups) == 1:
            return groups[0].payload("k", self.flight)
        return torch.cat([self.keys("read"), self._own["read"]], dim=1)

    @property
    def apart(self) -> bool:
        """Whether frames of the query meet the same row at different times."""
        return self.lag is not None and self.lag.shape[1] > 1

    # -- attention -------------------------------------------------------------------------

    def logits(self, query: Tensor, frame: int = 0) -> Tensor:
        """What the softmax is taken of, ``[H, t, N + P]``, for rotated queries ``[H, t, D]``.

        -inf where a shorter head has no row; merged rows count for their weight if the policy's
        bias says so. In float32 or wider.

        Args:
            query: Some of the queries.
            frame: The query frame they belong to, where frames meet rows at other times.
        """
        keys = self.joint_keys
        if frame and self.apart:
            keys = torch.cat([self.keys_at(frame), self._own["read"]], dim=1)
        logits = (query @ keys.transpose(1, 2)).to(torch.promote_types(query.dtype, torch.float32))
        logits = logits / keys.shape[-1] ** 0.5
        if self.log_weight:
            logits[..., : len(self)] += self.weight.clamp_min(1e-30).log().unsqueeze(1)
        if self.ragged:
            logits[..., : len(self)].masked_fill_(~self.valid.unsqueeze(1), -torch.inf)
        return logits

    def attention(
        self, per_query_frame: bool = False, queries: Tensor | None = None, over: str = "held"
    ) -> tuple[Tensor, Tensor]:
        """Softmax mass on every row, summed over the queries.

        A block of queries at a time. Over all that is held every key is met once more, which
        ``kv_scored_fraction`` shows; over what is read it is what attention does anyway.

        Args:
            per_query_frame: Sums for each query frame (Q frames) instead of all together (Q = 1).
            queries: int64: only these of the T queries.
            over: ``held``; or ``read``, once the pass has attended (in ``observe``).

        Returns:
            On held rows ``[H, Q, N]``, and on those in flight ``[H, Q, P]``.
        """
        query = self.query if queries is None else self.query.index_select(1, queries)
        if self.apart and queries is not None:
            raise ValueError(
                "Mass of some queries was asked for, but query frames meet rows at different times "
                "here. Ask for all queries."
            )
        split = self.query_frames if per_query_frame or self.apart else 1
        masks = self.read if over == "read" else (None, None)
        if over == "held":
            self._touched(query.shape[1])
        keys = len(self) + self.flight
        block, parts = max(1, BLOCK // (self.heads * keys)), []
        for index, frame in enumerate(query.chunk(split, 1)):
            total = None
            for q in frame.split(block, 1):
                logits = self.logits(q, index)
                bias = self.selection.bias if over == "read" and self.selection else None
                if bias is not None and bias.shape[1] > 1 and split == 1:
                    raise ValueError(
                        "Mass over what was read was asked for all queries together, but query "
                        "frames have biases of their own here. Ask with per_query_frame=True."
                    )
                if bias is not None:
                    logits = logits + bias[:, min(index, bias.shape[1] - 1)].unsqueeze(1)
                self._hide(logits, masks, index if split > 1 else None)
                mass = logits.softmax(-1).sum(1)
                total = mass if total is None else total + mass
            parts.append(total)
        mass = torch.stack(parts, 1)
        mass = mass if per_query_frame else mass.sum(1, keepdim=True)
        return mass[..., : len(self)], mass[..., len(self) :]

    def _hide(
        self, logits: Tensor, masks: tuple[Tensor | None, Tensor | None], index: int | None
    ) -> None:
        for mask, rows in zip(masks, (slice(0, len(self)), slice(len(self), None)), strict=True):
            if mask is None:
                continue
            if mask.shape[1] > 1 and index is None:
                raise ValueError(
                    "Mass over what was read was asked for all queries together, but query frames "
                    "read differently here. Ask with per_query_frame=True."
                )
            own = mask[:, min(index or 0, mask.shape[1] - 1)]
            logits[..., rows].masked_fill_(~own.unsqueeze(1), -torch.inf)

    def frame_logits(self, per_query_frame: bool = False) -> Tensor:
        """Log-sum-exp of each held frame's logits, averaged over the queries, ``[H, Q, F]``.

        Counts every held key once for every query, as :meth:`attention` does. -inf where a head
        holds nothing of a frame.
        """
        self._touched(self.query.shape[1])
        split = self.query_frames if per_query_frame or self.apart else 1
        block, parts = max(1, BLOCK // (self.heads * (len(self) + self.flight))), []
        for index, frame in enumerate(self.query.chunk(split, 1)):
            every = [
                self.by_frame(self.logits(q, index)[..., : len(self)], "logsumexp")
                for q in frame.split(block, 1)
            ]
            parts.append(torch.cat(every, 1).mean(1))
        found = torch.stack(parts, 1)
        return found if per_query_frame else found.mean(1, keepdim=True)

    def _touched(self, queries: int) -> None:
        self.scored += sum(self.lengths) * queries
