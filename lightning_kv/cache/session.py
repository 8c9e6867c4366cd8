"""The only cache object a model sees: it writes, asks the policy, and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Retention
from lightning_kv.cache.host import fetch, upload
from lightning_kv.cache.kernels import Workspace, known_backend
from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.plan import raised
from lightning_kv.cache.rotary import rotate_by
from lightning_kv.cache.rows import Rows
from lightning_kv.cache.sample import SampleCache
from lightning_kv.cache.view import PassView

Watch = Callable[[PassView], None]
Aside = tuple[Rows, tuple[int, ...], bool, bool]


class Policy(Protocol):
    """What a session asks of a cache policy (``lightning_kv.policies.base.CachePolicy``)."""

    retain: Any
    select: Any
    positions: Any
    precision: Any
    bias: str | None
    branches: str
    columns: dict[str, str]
    needs: dict[str, Any]
    inputs: tuple[str, ...]


@dataclass
class Cost:
    """What one sample's cache cost.

    Args:
        rows_read: History rows read, times the queries that read them, summed over layers, heads
            and the denoise and commit passes after the context.
        rows_scored: The same for keys touched only to score them.
        rows_history: The same if every pass had read its whole history.
        chunk_bytes: Held bytes while each chunk is denoised.
        peak_bytes: The most that was held after any pass, with the work buffers and the read plans.
        rebuilt_frames: Past frames that were encoded again on the policy's word.
    """

    rows_read: int = 0
    rows_scored: int = 0
    rows_history: int = 0
    chunk_bytes: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    rebuilt_frames: int = 0


class CacheSession:
    """Cache of one rollout.

    Args:
        geometry: Sizes of the model.
        policy: What decides.
        seeds: Base of the random draws of each sample; their number is the batch size.
        backend: Kernel name (see :data:`lightning_kv.cache.kernels.BACKENDS`).
        context_frames: Given frames; passes over them are left out of the read counts.
        tables: Values for declared needs, by name, one per sample.
        watch: Told of every pass of every layer, once it has attended.
        keys: Prompt key of each sample.
        inputs: Side inputs by frame, by name, such as ``pose`` ``[F, 4, 4]`` (camera to world);
            a list has one for each sample. Parts find them in ``view.inputs``.
        buffers: Turned and gathered copies of rows are made anew in every pass (``remake``: one
            layer's work buffer), or live as long as their plan (``keep``: faster, up to one more
            copy of what is read).
        gradients: In passes with ``mode="grad"``, committed rows of so many newest chunks let
            gradients through.

    Raises:
        ValueError: Unknown backend or buffers, or a need that nothing here can meet.
    """

    def __init__(
        self,
        geometry: Geometry,
        policy: Policy,
        seeds: Sequence[int] = (0,),
        backend: str = "sdpa",
        context_frames: int = 0,
        tables: Mapping[str, Sequence[Any]] | None = None,
        watch: Watch | None = None,
        keys: Sequence[str] | None = None,
        inputs: dict[str, Any] | None = None,
        buffers: Literal["remake", "keep"] = "remake",
        gradients: int = 0,
    ) -> None:
        if buffers not in ("remake", "keep"):
            raise ValueError(f"buffers={buffers!r} is unknown. Use remake or keep.")
        self.geometry, self.policy, self.seeds = geometry, policy, tuple(seeds)
        self.backend, self.context_frames = known_backend(backend), context_frames
        self.watch, self.tables, self.inputs = watch, tables or {}, inputs or {}
        self.keys = tuple(keys) if keys is not None else (None,) * len(self.seeds)
        self.buffers, self.gradients, self.work = buffers, gradients, Workspace()
        self.costs = [Cost() for _ in self.seeds]
        self.samples = [SampleCache(self, index) for index in range(len(self.seeds))]
        self._trig: tuple[Any, Tensor, Tensor] | None = None
        absent = [name for name in policy.inputs if name not in self.inputs]
        if absent:
            raise ValueError(
                f"The policy needs the side input {', '.join(absent)} of every frame. There: "
                f"{', '.join(sorted(self.inputs)) or 'none'}. `evaluate` brings the pose of the "
                "camera in a known panorama; in Python: rollout(..., inputs={'pose': ...})."
            )
        missing = sorted(policy.needs.keys() - self.tables.keys())
        if missing:
            raise ValueError(
                f"The policy needs {', '.join(missing)} of the reference rollout of the same clip. "
                f"There: {', '.join(sorted(self.tables)) or 'none'}. `evaluate` records them; in "
                "Python: rollout(..., record=policy.needs), then tables=made.tables."
            )

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

        Raises:
            ValueError: Gradients are asked of a pass that overwrites, or a part's decision is none.
        """
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if step.mode == "run" and wanted:
            raise ValueError(
                f"Gradients were asked of a pass with mode='run' (layer {layer}, chunk "
                f"{step.chunk}), which overwrites rows in place. Use mode='grad', or no_grad()."
            )
        with torch.autocast(
            q.device.type, enabled=False
        ):  # decisions and sums keep their precision
            return self._attend(layer, q, k, v, step)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        cos, sin = self._angles(step, q)
        raw_q, raw_k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
        turned_q, turned_k = rotate_by(raw_q, cos, sin), rotate_by(raw_k, cos, sin)
        out = []
        for row, sample in enumerate(self._chosen(step)):
            own = {"read": turned_k[row], "raw": raw_k[row], "value": v[row]}
            cache = self.samples[sample]
            out.append(cache.attend(layer, turned_q[row], raw_q[row], own, step))
        together = out[0].unsqueeze(0) if len(out) == 1 else torch.stack(out)
        return together.transpose(1, 2)

    def view(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass, row: int = 0
    ) -> PassView:
        """What a part is shown in a pass of one layer, as if everything held were read.

        For measurements from outside; nothing is decided, written or counted.

        Args:
            layer: As in :meth:`attend`.
            q: As in :meth:`attend`, and the two after it.
            k: Keys before rotation.
            v: Values.
            step: The pass.
            row: Which of the samples of the pass.
        """
        cos, sin = self._angles(step, q)
        raw_q, raw_k, v = (x[row].transpose(0, 1) for x in (q, k, v))  # [H, T, D]
        turned_q, turned_k = rotate_by(raw_q, cos, sin), rotate_by(raw_k, cos, sin)
        own = {"read": turned_k, "raw": raw_k, "value": v}
        return self.samples[self._chosen(step)[row]].shown(layer, turned_q, raw_q, own, step)

    # -- what the rollout calls ------------------------------------------------------------

    def finish(self, step: Pass) -> list[tuple[int, Rebuild]]:
        """Close a pass after the last layer; commit and decide if it made frames final.

        One transfer tells the host what it must know of the decisions of all layers and samples.

        Returns:
            Samples whose policy wants past frames encoded again.
        """
        if step.mode == "scratch":
            return []
        chosen = [self.samples[index] for index in self._chosen(step)]
        for cache in chosen:
            if step.opens and not step.rebuild:
                cache.weigh(step, step.phase == "denoise")
        if not step.final:
            return []
        for cache in chosen:
            cache.commit(step)
        if step.rebuild:
            for cache in chosen:
                cache.weigh(step)
            return []
        answers = [cache.retained(step) for cache in chosen]
        self._carry_out(
            [(cache, answer[0]) for cache, answer in zip(chosen, answers, strict=True)], step
        )
        rebuilds = [(c.index, a[1]) for c, a in zip(chosen, answers, strict=True) if a[1]]
        self._recode([c for c, a in zip(chosen, answers, strict=True) if a[1] is None], step)
        for cache in chosen:
            cache.weigh(step)
        return rebuilds

    def event(self, event: Event, step: Pass) -> list[tuple[str, int, Rebuild]]:
        """Tell every sample's policy, in every namespace, of an event before the pass ``step``.

        Returns:
            Namespace and sample of those whose policy wants past frames encoded again.
        """
        rebuilds = []
        for namespace in list(self.samples[0].stores):
            here = replace(step, namespace=namespace)
            answers = [(cache, cache.told(event, here)) for cache in self.samples]
            self._carry_out([(cache, answer[0]) for cache, answer in answers], here)
            rebuilds += [(namespace, c.index, a[1]) for c, a in answers if a[1] is not None]
        return rebuilds

    def on_prediction(self, step: Pass, timestep: float, x0: Tensor) -> None:
        """Show parts the clean estimate ``[B, F, C, h, w]`` of a denoising pass."""
        self._shown("on_prediction", step, lambda row: (step, timestep, x0[row]))

    def on_final(self, step: Pass, x0: Tensor) -> None:
        """Show parts the latents ``[B, F, C, h, w]`` that have become final."""
        self._shown("on_final", step, lambda row: (x0[row],))

    def _shown(self, name: str, step: Pass, given: Callable[[int], tuple[Any, ...]]) -> None:
        for row, sample in enumerate(self._chosen(step)):
            cache = self.samples[sample]
            asked = [] if cache.follows(step.namespace) else cache.asked(step.namespace)
            for part, state in asked:
                if (told := getattr(part, name, None)) is not None:
                    told(*given(row), state)

    def clear(self, sample: int, namespace: str, answer: Rebuild) -> list[Aside]:
        """Forget the rows of one sample, before a rebuild; spared ones stay if they are read.

        Returns:
            Per layer, the rows of spared frames that are unread, for :meth:`rebuilt`.
        """
        stores = self.samples[sample].stores[namespace]
        masks = [store.table.rows_from(answer.spare) for store in stores]
        asked = [Retention(keep=mask) for mask in masks]
        measured = [store.measured(x) for store, x in zip(stores, asked, strict=True)]
        known = iter(fetch([x for own in measured for x in own]))
        aside = []
        for store, decision in zip(stores, asked, strict=True):
            store.apply(decision, known)
            aside.append((store.memory, store.frames, store.whole, store.weighted))
            store.clear()
            if answer.read:
                store.put_in_front(*aside.pop())
        return aside

    def rebuilt(self, sample: int, step: Pass, answer: Rebuild, aside: list[Aside]) -> None:
        """Close a rebuild: only what it ``holds`` stays of its frames, behind spared rows.

        Then rows get their codecs, and bytes are counted.
        """
        cache = self.samples[sample]
        stores = cache.stores[step.namespace]
        if answer.hold is not None:
            stay = {*answer.hold, *(answer.spare if answer.read else ())}
            keep = [Retention(keep=store.table.rows_from(stay)) for store in stores]
            self._carry_out([(cache, keep)], step)
        for store, saved in zip(stores, aside, strict=False):  # none where they were read
            store.put_in_front(*saved)
        self._recode([cache], step)
        cache.weigh(step)

    def held_frames(self) -> float:
        """Committed and archived frames of all samples, mean of all layers and heads."""
        stores = [s for cache in self.samples for own in cache.stores.values() for s in own]
        rows = sum(sum(x.lengths) for store in stores for x in (store.memory, store.archive))
        of = self.geometry
        return rows / (of.layers * of.heads * of.tokens)

    def held_bytes(self, sample: int) -> int:
        """Distinct storages reachable from the store and the parts' state."""
        return self.samples[sample].held_bytes()

    # -- inside ----------------------------------------------------------------------------

    def _chosen(self, step: Pass) -> Sequence[int]:
        return step.samples if step.samples is not None else range(len(self.seeds))

    def _angles(self, step: Pass, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the query's tokens, shared by all layers of a pass."""
        key = (step.query_times, like.device, like.dtype)
        if self._trig is None or self._trig[0] != key:
            count, tokens = len(step.frames), self.geometry.tokens
            times = upload(step.query_times, like, torch.float64)
            time = times.unsqueeze(1).expand(-1, tokens).flatten()
            row, column = self.geometry.places(like.device).repeat(count, 1).unbind(-1)
            angles = self.geometry.rotary.angles(time, row, column)
            work = torch.promote_types(like.dtype, self.geometry.rotary.work)
            self._trig = key, angles.cos().to(work), angles.sin().to(work)
        return self._trig[1:]

    def _carry_out(
        self, decisions: list[tuple[SampleCache, list[Retention | None]]], step: Pass
    ) -> None:
        """Decisions of all layers and samples, with one transfer."""
        todo = [
            (cache, layer, store, decision)
            for cache, own in decisions
            for layer, (store, decision) in enumerate(
                zip(cache.stores[step.namespace], own, strict=True)
            )
            if decision is not None
        ]
        measured = [store.measured(decision) for _, _, store, decision in todo]
        doubts = [doubt for cache, _ in decisions for doubt in cache.doubted()]
        flat = [x for own in measured for x in own]
        found = fetch([*flat, *(wrong for wrong, _ in doubts)])
        raised([t for (_, t), yes in zip(doubts, found[len(flat) :], strict=True) if yes[0]])
        known = iter(found)
        # rows that get a codec next leave room only then: it is theirs until they do
        room = 0 if self.policy.precision.codes else self._room(step)
        for _, _, store, decision in todo:
            with torch.set_grad_enabled(torch.is_grad_enabled() or store.live):
                store.apply(decision, known, room)

    def _recode(self, caches: list[SampleCache], step: Pass) -> None:
        todo = [
            (store, own)
            for cache in caches
            for store, own in zip(cache.stores[step.namespace], cache.recoded(step), strict=True)
            if own
        ]
        measured = [x for store, own in todo for x in store.measured_codes(own)]
        known = iter(fetch(measured))
        for store, own in todo:
            store.recode(own, known, self._room(step))

    def _room(self, step: Pass) -> int:
        """Rows that the next passes will put behind the committed ones."""
        of, coming = self.geometry, step.next_chunk or len(step.frames) * (not step.final)
        wide = of.flight if coming and of.flight > of.chunk else coming
        return wide * of.tokens
