"""The only cache object a model sees: it writes, asks the policy, and reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.attend import known_backend
from lightning_kv.cache.decider import Decider
from lightning_kv.cache.decisions import Event, Rebuild, Retention, Selection
from lightning_kv.cache.needs import COLLECTORS, Collector
from lightning_kv.cache.passes import LEADER, Geometry, Pass, following
from lightning_kv.cache.resolve import check_needs, resolve
from lightning_kv.cache.rotary import rotate, rotate_by
from lightning_kv.cache.rows import Group, RowSet
from lightning_kv.cache.store import Cell, reachable_bytes
from lightning_kv.cache.view import CacheView


@dataclass
class Cost:
    """What one sample's cache cost.

    Args:
        rows_read: History rows read, times the queries that read them, summed over layers, heads
            and the denoise and commit passes after the context.
        rows_scored: The same for keys touched only to score them.
        rows_history: The same if every pass had read its whole history.
        chunk_bytes: Held bytes while each chunk is denoised.
        peak_bytes: The most that was ever held.
        rebuilt_frames: Past frames that were encoded again on the policy's word.
    """

    rows_read: int = 0
    rows_scored: int = 0
    rows_history: int = 0
    chunk_bytes: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    rebuilt_frames: int = 0


Watch = Callable[[int, CacheView, Selection | None], None]


@dataclass
class Lane:
    """One sample in one namespace: cells per layer, a decider and its statistics."""

    cells: list[Cell]
    decider: Decider
    collectors: dict[str, Collector]
    seed: int


class CacheSession:
    """Cache of one rollout.

    Args:
        geometry: Sizes of the model.
        start: Makes a fresh decider; called once per sample and namespace.
        seeds: Base of the random draws of each sample; their number is the batch size.
        backend: Kernel name (see :data:`lightning_kv.cache.attend.KERNELS`).
        context_frames: Given frames; passes over them are left out of the read counts.
        tables: Values for needs that are not collected here, such as ``reference_mass``.
        watch: Told of every pass of every layer, once it has attended: sample, view and selection.

    Raises:
        ValueError: Unknown backend, or a need that nothing here can meet.
    """

    def __init__(
        self,
        geometry: Geometry,
        start: Callable[[], Decider],
        seeds: Sequence[int] = (0,),
        backend: str = "sdpa",
        context_frames: int = 0,
        tables: dict[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.geometry, self.start, self.seeds = geometry, start, tuple(seeds)
        self.kernel, self.context_frames = known_backend(backend), context_frames
        self.tables = tables or {}
        self.costs = [Cost() for _ in self.seeds]
        self.lanes: dict[tuple[str, int], Lane] = {}
        self._trig: tuple[Any, Tensor, Tensor] | None = None
        check_needs(start().needs, self.tables)

    # -- what the model calls --------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention of one layer to the selected history and the frames in flight.

        Args:
            layer: Index of the block.
            q: Queries before rotation ``[B, T, H, D]``; k and v alike.
            k: Keys before rotation.
            v: Values.
            step: The pass.

        Returns:
            ``[B, T, H, D]``.
        """
        cos, sin = self._angles(step, q)
        raw_q, raw_k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
        turned_q, turned_k = rotate_by(raw_q, cos, sin), rotate_by(raw_k, cos, sin)
        out = torch.empty_like(turned_q)
        for row, sample in enumerate(self._samples(step)):
            lane = self.lane(sample, step.namespace, k)
            cell = lane.cells[layer]
            view = self._view(lane, layer, step)
            view.query, view.raw_query = turned_q[row], raw_q[row]
            if step.opens and lane.decider.opens and not step.rebuild:
                self._open(lane, view)
            cell.write((turned_k if cell.rotated else raw_k)[row], v[row])
            view.read_keys = [
                self._keys(lane, view, group, cos, sin) for group in cell.memory.groups
            ]
            for collector in lane.collectors.values():
                collector.observe(view)
            selection = None if step.rebuild else lane.decider.select(view)
            read, bias = resolve(selection, view, lane.decider.bias)
            for i, group in enumerate(cell.memory.groups):
                alike = len(group.heads) == self.geometry.heads
                heads = slice(None) if alike else list(group.heads)
                values = cell.readable(group, "v")
                out[row, heads] = self.kernel(
                    view.query[heads], view.read_keys[i], values, read[i], bias[i]
                )
            if self.watch is not None:
                view.output = out[row]
                self.watch(sample, view, selection)
            self._count(sample, view, read)
        return out.transpose(1, 2)

    # -- what the rollout calls ------------------------------------------------------------

    def finish(self, step: Pass) -> list[tuple[int, Rebuild]]:
        """Close a pass after the last layer; commit and decide if it made frames final.

        Returns:
            Samples whose policy wants past frames encoded again.
        """
        rebuilds = []
        for sample in self._samples(step):
            lane = self.lanes[step.namespace, sample]
            if step.opens and not step.rebuild:
                self._weigh(sample, step if step.phase == "denoise" else None)
            if not step.final:
                continue
            self._commit(lane, step)
            if not step.rebuild:
                views = self._views(lane, step)
                answer = self._carry_out(lane, lane.decider.commit(views))
                self.costs[sample].rows_scored += self._scored(views, step)
                rebuilds += [(sample, answer)] if answer else []
                if not answer:
                    self._recode(lane, step)
            self._weigh(sample)
        return rebuilds

    def event(self, event: Event, step: Pass) -> list[tuple[str, int, Rebuild]]:
        """Tell every sample's policy, in every namespace, of an event before the pass ``step``.

        Returns:
            Namespace and sample of those whose policy wants past frames encoded again.
        """
        rebuilds = []
        for (namespace, sample), lane in self.lanes.items():
            for collector in lane.collectors.values():
                collector.event(event)
            here = replace(step, namespace=namespace)
            views = self._views(lane, here, after=False)
            answer = self._carry_out(lane, lane.decider.event(event, views))
            rebuilds += [(namespace, sample, answer)] if answer else []
        return rebuilds

    def lane(self, sample: int, namespace: str, like: Tensor) -> Lane:
        """The cache of one sample, made when first asked for."""
        found = self.lanes.get((namespace, sample))
        if found is None:
            leader = self.lanes.get((LEADER, sample))
            decider = leader.decider.branch() if leader else self.start()
            asked = {n: x for n, x in sorted(decider.needs.items()) if n in COLLECTORS}
            collectors = {name: COLLECTORS[name](**how) for name, how in asked.items()}
            columns = dict(decider.columns)
            for collector in collectors.values():
                columns |= collector.columns
            cells = [
                Cell(self.geometry, not decider.moves, columns, like)
                for _ in range(self.geometry.layers)
            ]
            found = Lane(cells, decider, collectors, self.seeds[sample])
            self.lanes[namespace, sample] = found
            here = Pass("prefill", (0,), (0.0,), chunk=0, namespace=namespace)
            if decider.event(Event("start"), self._views(found, here)) is not None:
                raise ValueError(
                    "A retain part answered the event 'start', when nothing is held yet. "
                    "It may set up its state there; answer at commit or at a later event."
                )
        return found

    def clear(self, sample: int, namespace: str, spare: Sequence[int] = ()) -> list[RowSet]:
        """Forget the rows of one sample, before a rebuild.

        Returns:
            Per layer, the rows of the frames ``spare``, for :meth:`rebuilt`.
        """
        aside = []
        for cell in self.lanes[namespace, sample].cells:
            aside.append(cell.memory.select(_rows_of(cell, spare)))
            cell.clear()
        return aside

    def rebuilt(
        self, sample: int, step: Pass, hold: Sequence[int] | None, aside: list[RowSet]
    ) -> None:
        """Close a rebuild: only ``hold`` stays of its frames, behind the rows put aside.

        Then rows get their codecs, and bytes are counted.
        """
        lane = self.lanes[step.namespace, sample]
        for cell, spared in zip(lane.cells, aside, strict=True):
            if hold is not None:
                cell.apply(Retention(keep=_rows_of(cell, hold)))
            cell.memory = spared.extended(cell.memory)
        self._recode(lane, step)
        self._weigh(sample)

    def held_bytes(self, sample: int) -> int:
        """Distinct storages reachable from the store, the statistics and the policy's state."""
        lanes = [lane for (_, owner), lane in self.lanes.items() if owner == sample]
        return reachable_bytes(
            [(cell.memory, cell.archive) for lane in lanes for cell in lane.cells],
            [(lane.collectors, lane.decider) for lane in lanes],
        )

    # -- inside ----------------------------------------------------------------------------

    def _samples(self, step: Pass) -> Sequence[int]:
        return step.samples if step.samples is not None else range(len(self.seeds))

    def _angles(self, step: Pass, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the query's tokens, shared by all layers of a pass."""
        key = (step.query_times, like.device)
        if self._trig is None or self._trig[0] != key:
            rows, columns = self.geometry.grid
            times = torch.tensor(step.query_times, dtype=torch.float64)
            place = torch.arange(rows * columns).repeat(len(times))
            time = times.repeat_interleave(rows * columns)
            angles = self.geometry.rotary.angles(time, place // columns, place % columns)
            work = torch.promote_types(like.dtype, self.geometry.rotary.work)
            cos, sin = (x.to(like.device, work) for x in (angles.cos(), angles.sin()))
            self._trig = key, cos, sin
        return self._trig[1:]

    def _view(self, lane: Lane, layer: int, step: Pass) -> CacheView:
        collected = {name: x.value(layer) for name, x in lane.collectors.items()}
        return CacheView(
            lane.cells[layer],
            layer,
            step,
            collected=self.tables | collected,
            statistics=collected,
            seed=lane.seed,
            log_weight=lane.decider.bias == "log_weight",
        )

    def _views(self, lane: Lane, step: Pass, after: bool = True) -> list[CacheView]:
        """Every layer between two passes; each can say how the next chunk will meet its keys.

        ``step`` is done, or is itself the next (``after=False``).
        """
        views = [self._view(lane, layer, step) for layer in range(len(lane.cells))]
        coming = following(step) if after and step.final else step
        for view in views:
            view.look_ahead = partial(self._ahead, lane, view, coming)
        return views

    def _ahead(self, lane: Lane, view: CacheView, coming: Pass) -> CacheView:
        """The view that the next chunk would have, before it has queries."""
        found = replace(view, step=coming)
        device = view.groups[0].meta["time"].device
        still = torch.zeros(0, self.geometry.head_dim // 2, device=device)
        found.read_keys = [self._keys(lane, found, group, still, still) for group in view.groups]
        found.read_times = [
            group.meta["time"] if view.cell.rotated else lane.decider.times(found, group)
            for group in view.groups
        ]
        return found

    def _open(self, lane: Lane, view: CacheView) -> None:
        """An ``open`` retention decides with the chunk's first queries at hand."""
        still = view.query.new_zeros(0, self.geometry.head_dim // 2)
        view.read_keys = [self._keys(lane, view, group, still, still) for group in view.groups]
        decision = lane.decider.open(view)
        if decision is not None:
            view.cell.apply(decision)
            view.forget()

    def _keys(self, lane: Lane, view: CacheView, group: Group, cos: Tensor, sin: Tensor) -> Tensor:
        keys = view.cell.readable(group, "k")
        if view.cell.rotated:
            return keys
        rows = len(group)
        times = lane.decider.times(view, group)
        angles = view.cell.angles(times, group.meta["place"])
        past = rotate(keys[:, :rows], angles, self.geometry.rotary.work)
        return torch.cat([past, rotate_by(keys[:, rows:], cos, sin)], dim=1)

    def _commit(self, lane: Lane, step: Pass) -> None:
        tokens, frames = self.geometry.tokens, step.frames
        first, count = frames.index(step.final[0]), len(step.final)
        final = slice(first * tokens, (first + count) * tokens)
        times = step.query_times[first : first + count]
        for layer, cell in enumerate(lane.cells):
            device = cell.memory.groups[0].meta["time"].device
            meta = {
                "frame_id": torch.tensor(step.final, device=device).repeat_interleave(tokens),
                "time": torch.tensor(times, device=device).repeat_interleave(tokens),
                "place": torch.arange(tokens, device=device).repeat(count),
            }
            for collector in lane.collectors.values():
                meta |= {n: x[:, final] for n, x in collector.initial(layer).items()}
            cell.commit(final, meta)

    def _carry_out(
        self, lane: Lane, answer: list[Retention | None] | Rebuild | None
    ) -> Rebuild | None:
        if isinstance(answer, Rebuild):
            return answer
        for cell, decision in zip(lane.cells, answer or [None] * len(lane.cells), strict=True):
            if decision is not None:
                cell.apply(decision)
        return None

    def _recode(self, lane: Lane, step: Pass) -> None:
        answers = lane.decider.recode(self._views(lane, step))
        for cell, decisions in zip(lane.cells, answers, strict=True):
            for decision in decisions:
                cell.recode(decision)

    def _counts(self, step: Pass) -> bool:
        return step.phase != "prefill" and not step.rebuild and step.start >= self.context_frames

    def _count(self, sample: int, view: CacheView, read: list[Tensor | None]) -> None:
        if not self._counts(view.step):
            return
        tokens, total = view.query.shape[1], 0
        for group, chosen in zip(view.groups, read, strict=True):
            if chosen is None:
                total += len(group.heads) * len(group) * tokens
            else:
                total += int(chosen[..., : len(group)].sum()) * (tokens // chosen.shape[1])
        history = view.step.start * self.geometry.tokens
        self.costs[sample].rows_history += history * self.geometry.heads * tokens
        self.costs[sample].rows_read += total
        self.costs[sample].rows_scored += view.scored

    def _scored(self, views: list[CacheView], step: Pass) -> int:
        return sum(view.scored for view in views) if self._counts(step) else 0

    def _weigh(self, sample: int, opening: Pass | None = None) -> None:
        held, cost = self.held_bytes(sample), self.costs[sample]
        cost.peak_bytes = max(cost.peak_bytes, held)
        if opening and opening.namespace != LEADER:
            cost.chunk_bytes.pop()  # what the leading branch held was not all
        if opening:
            cost.chunk_bytes.append(held)


def _rows_of(cell: Cell, frames: Sequence[int]) -> list[Tensor]:
    """Rows of some frames, per head."""
    ids = cell.memory.column("frame_id")
    wanted = torch.tensor(list(frames), dtype=ids[0].dtype, device=ids[0].device)
    return [torch.isin(own, wanted).nonzero().flatten() for own in ids]
