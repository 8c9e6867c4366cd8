"""One sample of a session: its rows, what its parts remember, and the plans in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_kv.cache.checks import (
    asking,
    check_lag,
    check_recodes,
    check_retention,
    check_selection,
    named,
)
from lightning_kv.cache.decisions import Event, Rebuild, Recode, Retention, Selection
from lightning_kv.cache.held import reachable_bytes
from lightning_kv.cache.host import fetch
from lightning_kv.cache.kernels import ReadPlan
from lightning_kv.cache.passes import CONDITIONAL, Pass, following
from lightning_kv.cache.plan import masks, plan_key, plan_of, raised, read_by_masks
from lightning_kv.cache.store import LayerStore
from lightning_kv.cache.view import CacheView, PassView

if TYPE_CHECKING:
    from lightning_kv.cache.session import CacheSession

State = dict[Any, Any]
Answer = list[Retention | None] | Rebuild | tuple[list[Retention | None], Rebuild] | None
PARTS = ("retain", "select", "positions", "precision")


class SampleCache:
    """Rows by namespace and layer, the parts' states, and the plans in force, of one sample."""

    def __init__(self, session: CacheSession, index: int) -> None:
        self.session, self.index, self.policy = session, index, session.policy
        self.stores: dict[str, list[LayerStore]] = {}
        self.states: dict[str, dict[str, State]] = {}
        self.plans: dict[tuple[str, int, bool], ReadPlan] = {}
        self.turns = self.policy.positions.moves or self.policy.precision.raw
        self._said: dict[str, Any] = {}  # answers that other branches take over
        self._doubts: list[tuple[Tensor, str]] = []

    def attend(
        self, layer: int, q: Tensor, raw_q: Tensor, own: dict[str, Tensor], step: Pass
    ) -> Tensor:
        """Attention of one layer; queries and own rows are ``[H, T, D]``."""
        store = self._layers(step.namespace, own["read"])[layer]

        def pass_view() -> PassView:  # only made where somebody looks
            return PassView(q, raw_q, own, **self._settings(layer, step))

        if step.mode == "scratch":
            return self._scratch(store, layer, q, own, step, pass_view)
        store.write(own["read"], own["value"], step.mode == "grad")
        moments = () if step.rebuild else self.policy.retain.moments
        for moment, now in (("open", step.opens), ("closing", step.final)):
            if now and moment in moments:
                self._retain_now(moment, store, layer, own, step, pass_view)
        plan, view = self._plan(store, layer, step, pass_view)
        if self.session.backend == "reference":
            out = read_by_masks(plan, view or pass_view(), q, own)
        else:
            work = None if step.mode == "grad" else self.session.work
            lasts = self.session.buffers == "keep" and self.policy.select.refresh == "chunk"
            out = plan.read(q, store, work, lasts, store.own)
        if step.final and not store.rotated:
            store.finalise(own["raw"], step.final_rows(self.session.geometry.tokens))
        self._look(plan, view, pass_view, out, layer, step)
        self._count(plan, q.shape[1], step)
        return out

    def shown(
        self, layer: int, q: Tensor, raw_q: Tensor, own: dict[str, Tensor], step: Pass
    ) -> PassView:
        """The view of a pass of one layer, at the positions it has if all that is held is read."""
        self._layers(step.namespace, own["read"])
        view = PassView(q, raw_q, own, **self._settings(layer, step))
        self._move(view, None)
        return view

    def _plan(
        self, store: LayerStore, layer: int, step: Pass, pass_view: Callable[[], PassView]
    ) -> tuple[ReadPlan, PassView | None]:
        """The plan in force, or a new one; and the view it was made with."""
        key = plan_key(step, store)
        slot = (step.namespace, layer, step.rebuild)
        found = self.plans.get(slot)
        again = not step.rebuild and self.policy.select.refresh == "pass"
        if found is not None and found.key == key and not again:
            return found, None
        if self.follows(step.namespace) and not step.rebuild:
            led = self.plans[CONDITIONAL, layer, False]
            plan = replace(led, key=key, blocks=[replace(b, kept={}) for b in led.blocks])
            self.plans[slot] = plan
            return plan, None
        view = pass_view()
        plan = plan_of(view, self._selected(view), key, named(self.policy.select, view))
        self.plans[slot] = plan
        self._spend(view)
        return plan, view

    def _selected(self, view: PassView) -> Selection | None:
        """Positions as if all were read, the selection, positions that depend on it."""
        positions, select = self.policy.positions, self.policy.select
        states = self.states[self._decides(view.step.namespace)]
        self._move(view, None)
        if view.step.rebuild:
            return None
        with self._asking(self.policy.select, view):
            selection = select.pick(view, states["select"])
        check_selection(selection, view, select)
        if selection is not None and positions.depends:
            self._move(view, selection)
        return selection

    def _move(self, view: CacheView, selection: Selection | None) -> None:
        positions = self.policy.positions
        if not self.turns:
            return
        state = self.states[self._decides(view.step.namespace)]["positions"]
        with self._asking(self.policy.positions, view):
            lag = positions.lags(view, state, selection)
        check_lag(lag, view, positions)
        view.lag = lag

    def _retain_now(
        self,
        moment: str,
        store: LayerStore,
        layer: int,
        own: dict[str, Tensor],
        step: Pass,
        pass_view: Callable[[], PassView],
    ) -> None:
        """A retention in the middle of a pass, for one layer."""
        name = f"{moment} {layer}"
        if self.follows(step.namespace):
            decision = self._said[name]
        else:
            view, part = pass_view(), self.policy.retain
            self._move(view, None)
            with self._asking(self.policy.retain, view):
                decision = getattr(part, moment)(view, self.states[step.namespace]["retain"])
            check_retention(decision, view, part)
            self._say(name, decision)
            self._spend(view)
        if decision is not None:
            doubts = self.doubted()
            measured = store.measured(decision)
            found = fetch([*measured, *(wrong for wrong, _ in doubts)])
            said = zip(doubts, found[len(measured) :], strict=True)
            raised([text for (_, text), yes in said if yes[0]])
            with torch.set_grad_enabled(torch.is_grad_enabled() or store.live):
                store.apply(decision, iter(found), own["read"].shape[1])
            store.write(own["read"], own["value"], step.mode == "grad")

    def _scratch(
        self,
        store: LayerStore,
        layer: int,
        q: Tensor,
        own: dict[str, Tensor],
        step: Pass,
        pass_view: Callable[[], PassView],
    ) -> Tensor:
        """Read as the plan in force says, else all that is held; the own rows are thrown away."""
        plan = self.plans.get((step.namespace, layer, step.rebuild))
        if plan is None or plan.key != plan_key(step, store):
            view = pass_view()
            self._move(view, None)
            plan = plan_of(view, None, None)
            self._doubts += view.doubts
        if self.session.backend == "reference":
            return read_by_masks(plan, pass_view(), q, own)
        return plan.read(q, store, None, own={"k": own["read"], "v": own["value"]})

    def _look(
        self,
        plan: ReadPlan,
        view: PassView | None,
        pass_view: Callable[[], PassView],
        out: Tensor,
        layer: int,
        step: Pass,
    ) -> None:
        """Let those parts observe that want to, and whoever watches."""
        kinds = {"rebuild"} if step.rebuild else {step.phase}
        if step.final and not step.rebuild and step.phase == "denoise":
            kinds.add("commit")
        asked = [] if self.follows(step.namespace) else self.asked(step.namespace)
        asked = [(part, state) for part, state in asked if kinds & set(part.observes)]
        if not asked and self.session.watch is None:
            return
        view = view or pass_view()
        view.lag, view.selection, view.output = plan.lag, plan.selection, out
        view.read = masks(plan.selection, view)
        before = view.scored
        for part, state in asked:
            with self._asking(part, view):
                part.observe(view, state)
        self._spend(view, view.scored - before)
        if self.session.watch is not None:
            self.session.watch(view)

    def commit(self, step: Pass) -> None:
        """Make the final frames of a pass permanent, in every layer."""
        final = step.final_rows(self.session.geometry.tokens)
        low = step.frames.index(step.final[0])
        times = step.query_times[low : low + len(step.final)]
        for store in self.stores[step.namespace]:
            store.commit(final, step.final, times, self.session.gradients)

    def retained(self, step: Pass) -> tuple[list[Retention | None], Rebuild | None]:
        """What the retain part says at a commit."""
        if "commit" not in self.policy.retain.moments:
            return [None] * self.session.geometry.layers, None
        if self.follows(step.namespace):
            return self._said["commit"]
        views = self.views(step)
        with self._asking(self.policy.retain, views[0]):
            answer = self.policy.retain.commit(views, self.states[step.namespace]["retain"])
        return self._noted("commit", answer, views)

    def told(self, event: Event, step: Pass) -> tuple[list[Retention | None], Rebuild | None]:
        """Tell all parts of an event; what the retain part answers counts."""
        if self.follows(step.namespace):
            nothing = [None] * self.session.geometry.layers, None
            return nothing if event.kind == "start" else self._said["event"]
        views, answer = self.views(step, after=False), None
        for part, state in self.asked(step.namespace):
            with self._asking(part, views[0]):
                said = part.event(event, views, state)
            answer = said if part is self.policy.retain else answer
        if event.kind == "start" and answer is not None:
            raise ValueError(
                "A retain part answered the event 'start', when nothing is held yet. "
                "It may set up its state there; answer at commit or at a later event."
            )
        return self._noted("event", answer, views)

    def _noted(
        self, question: str, answer: Answer, views: list[CacheView]
    ) -> tuple[list[Retention | None], Rebuild | None]:
        rebuild = answer if isinstance(answer, Rebuild) else None
        if isinstance(answer, tuple):
            answer, rebuild = answer
        decisions = answer if isinstance(answer, list) else [None] * len(views)
        part = self.policy.retain
        if len(decisions) != len(views):
            raise ValueError(
                f"{named(part, views[0])} gave {len(decisions)} decisions for {len(views)} layers. "
                "Give one for each, or None for a layer in which nothing changes."
            )
        for decision, view in zip(decisions, views, strict=True):
            check_retention(decision, view, part)
            self._spend(view)
        self._say(question, (decisions, rebuild))
        return decisions, rebuild

    def recoded(self, step: Pass) -> list[list[Recode]]:
        """Which rows get which codec, per layer."""
        if self.follows(step.namespace):
            return self._said["recode"]
        part, found = self.policy.precision, []
        if not part.codes:
            found = [[] for _ in self.stores[step.namespace]]
        else:
            for view in self.views(step):
                with self._asking(part, view):
                    found.append(part.assign(view, self.states[step.namespace]["precision"]))
                check_recodes(found[-1], view, part)
        self._say("recode", found)
        return found

    def _say(self, question: str, answer: Any) -> None:
        if self.policy.branches == "shared":  # somebody may follow
            self._said[question] = answer

    def views(self, step: Pass, after: bool = True) -> list[CacheView]:
        """Every layer after a pass, or before it (``after=False``)."""
        coming = following(step) if after and step.final else step
        ahead = partial(self._ahead, coming)
        stores = self.stores[step.namespace]
        return [
            CacheView(**self._settings(layer, step), look_ahead=ahead)
            for layer in range(len(stores))
        ]

    def _ahead(self, coming: Pass, view: CacheView) -> CacheView:
        """The view that the next chunk would have, before it has queries."""
        found = CacheView(**self._settings(view.layer, coming))
        found.doubts = view.doubts
        self._move(found, None)
        return found

    def doubted(self) -> list[tuple[Tensor, str]]:
        """Faults that only the device knows so far; they are forgotten here."""
        found, self._doubts = self._doubts, []
        return found

    def asked(self, namespace: str) -> Iterator[tuple[Any, State]]:
        """Every part with its state; budgets come before the part they belong to."""
        states = self.states[self._decides(namespace)]
        for kind in PARTS:
            part = getattr(self.policy, kind)
            budget = getattr(part, "budget", None)
            if budget is not None:
                yield budget, states[kind]["budget"]
            yield part, states[kind]

    def follows(self, namespace: str) -> bool:
        """Whether a branch under guidance takes over what the conditional one decides."""
        return self.policy.branches == "shared" and namespace != CONDITIONAL

    def _decides(self, namespace: str) -> str:
        return CONDITIONAL if self.follows(namespace) else namespace

    def _layers(self, namespace: str, like: Tensor) -> list[LayerStore]:
        found = self.stores.get(namespace)
        if found is None:
            policy, geometry = self.policy, self.session.geometry
            columns = dict(policy.columns)
            found = [
                LayerStore(geometry, not self.turns, columns, like.detach())
                for _ in range(geometry.layers)
            ]
            self.stores[namespace] = found
            if not self.follows(namespace):
                self.states[namespace] = {kind: self._fresh(kind) for kind in PARTS}
            self.told(Event("start"), Pass("prefill", (0,), (0.0,), chunk=0, namespace=namespace))
        return found

    def _fresh(self, kind: str) -> State:
        part = getattr(self.policy, kind)
        state, budget = part.fresh(), getattr(part, "budget", None)
        if budget is not None:
            state["budget"] = budget.fresh()
        return state

    def _settings(self, layer: int, step: Pass) -> dict[str, Any]:
        session = self.session
        return {
            "store": self.stores[step.namespace][layer],
            "layer": layer,
            "step": step,
            "sample": self.index,
            "key": session.keys[self.index],
            "seed": session.seeds[self.index],
            "tables": {name: own[self.index] for name, own in session.tables.items()},
            "inputs": {
                name: own[self.index] if isinstance(own, list | tuple) else own
                for name, own in session.inputs.items()
            },
            "log_weight": self.policy.bias == "log_weight",
            "fixed_bytes": partial(self._fixed_bytes, step.namespace),
            "old_row_bytes": self.policy.precision.row_bytes(session.geometry),
        }

    def _asking(self, part: Any, view: CacheView) -> AbstractContextManager[None]:
        return asking(part, view, self.stores[view.step.namespace])

    def _spend(self, view: CacheView, scored: int | None = None) -> None:
        """Count what a view's part has touched, and take up its doubts."""
        self._doubts += view.doubts
        view.doubts = []
        if self._counts(view.step):
            scored = view.scored if scored is None else scored
            self.session.costs[self.index].rows_scored += scored

    def _counts(self, step: Pass) -> bool:
        started = step.start >= self.session.context_frames
        return step.phase != "prefill" and not step.rebuild and started

    def _count(self, plan: ReadPlan, tokens: int, step: Pass) -> None:
        if not self._counts(step):
            return
        cost, geometry = self.session.costs[self.index], self.session.geometry
        cost.rows_history += step.start * geometry.tokens * geometry.heads * tokens
        cost.rows_read += round(plan.rows * tokens)

    def _fixed_bytes(self, namespace: str) -> int:
        states = self.states[self._decides(namespace)]
        stores = self.stores[namespace]
        coded = [s for x in stores for group in x.memory.groups for s in group.coded]
        shared = [(s.shared, s.rows.get("at")) for s in coded]
        return reachable_bytes(states, [store.archive for store in stores], shared)

    def held_bytes(self) -> int:
        """Distinct storages reachable from the stores, the states and what plans keep."""
        return reachable_bytes(self._held())

    def _held(self) -> list[Any]:
        stores = [store for own in self.stores.values() for store in own]
        kept = [block.kept for plan in self.plans.values() for block in plan.blocks]
        return [[(s.memory, s.archive, s.own) for s in stores], self.states, kept]

    def weigh(self, step: Pass, opening: bool = False) -> None:
        """Count the bytes that are held now."""
        held, cost = self.held_bytes(), self.session.costs[self.index]
        every = reachable_bytes(self._held(), self.plans) + self.session.work.held_bytes
        cost.peak_bytes = max(cost.peak_bytes, every)
        if opening and step.namespace != CONDITIONAL:
            cost.chunk_bytes.pop()  # what the conditional branch held was not all
        if opening:
            cost.chunk_bytes.append(held)
