"""Ways to run a pass: with kept buffers, without a trace, with gradients; and who is shown it."""

import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rules import (
    RAGGED,
    TOKENS,
    ByParity,
    Fold,
    FoldScript,
    ParityScript,
    RaggedScript,
    WindowScript,
)
from sessions import CHUNK, GEOMETRY, STORAGE, drive, passes, policy, session_of, store_of

from lightning_kv.cache.decisions import Rebuild, Selection
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.store import LayerStore
from lightning_kv.policies.base import RetainPart, SelectPart
from lightning_kv.testing import Script, Twin

WINDOW = {"part": "window", "budget": "3f"}


class Contiguous(WindowScript):
    """A window of three frames that stand side by side before the chunk."""

    def __init__(self):
        super().__init__(3, 0)

    def time(self, stream, step, row):
        frames = sorted({r.frame for r in stream.rows}, reverse=True)
        return step.start - 1 - frames.index(row.frame)


def some(shape, seed, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(dtype) for _ in range(3)]


def size_of(step, batch=1):
    return batch, len(step.frames) * TOKENS, GEOMETRY.heads, GEOMETRY.head_dim


# -- buffers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "copied"),
    [
        ({"retain": RAGGED}, False),
        ({"retain": RAGGED, "positions": "contiguous"}, True),
        ({"retain": WINDOW, "positions": "contiguous"}, True),
        ({"select": ByParity()}, True),
        ({"retain": RAGGED, "select": ByParity(), "positions": "contiguous"}, True),
        ({"precision": {"part": "aged", "codec": "int8", "age": 2}}, False),
        (
            {
                "retain": RAGGED,
                "select": ByParity(),
                "positions": "contiguous",
                "precision": {"part": "aged", "codec": "int8", "age": 1},
            },
            True,
        ),
        ({"retain": Fold(), "positions": "contiguous", "bias": "log_weight"}, True),
        ({"select": {"part": "top-attention", "budget": "2f"}, "positions": "contiguous"}, False),
    ],
    ids=[
        "ragged",
        "ragged and moved",
        "moved",
        "query frames",
        "ragged, moved and query frames",
        "coded",
        "all of these and coded",
        "merged and moved",
        "chosen in every pass",
    ],
)
def test_kept_buffers_change_nothing(parts, copied):
    """Bit by bit; over four noisy passes, most of which reuse what the first one made.

    Copies that the next pass makes anew anyway are not kept.
    """
    made = policy(**parts)
    kept, remade = (session_of(made, 2, buffers=how) for how in ("keep", "remake"))
    steps = list(passes(5, noisy=4))
    ours, theirs = drive(kept, steps), drive(remade, steps)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    blocks = [
        [block.kept for plan in session.samples[0].plans.values() for block in plan.blocks]
        for session in (kept, remade)
    ]
    assert any(blocks[0]) == copied and not any(blocks[1])


def test_kept_buffers_are_counted_in_the_bytes():
    made = policy(positions="contiguous")
    kept, remade = (session_of(made, buffers=how) for how in ("keep", "remake"))
    for session in (kept, remade):
        drive(session, passes(3), 1)
    rows = 3 * CHUNK * TOKENS  # the last commit pass read four frames and its own two
    copies = GEOMETRY.layers * GEOMETRY.heads * rows * GEOMETRY.head_dim * 4
    assert kept.held_bytes(0) - remade.held_bytes(0) == copies


def test_unknown_buffers_are_refused():
    with pytest.raises(ValueError, match="Use remake or keep"):
        session_of(policy(), buffers="some")


# -- scratch passes --------------------------------------------------------------------------


def picture(x):
    """Everything that can be reached, as plain data; tensors with all their bytes."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.detach().contiguous().numpy().tobytes()
    if isinstance(x, dict):
        return [(str(k), picture(v)) for k, v in x.items()]
    if isinstance(x, list | tuple):
        return [picture(v) for v in x]
    if isinstance(x, LayerStore):
        return picture({k: v for k, v in vars(x).items() if k != "geometry"})
    if is_dataclass(x):
        return picture({f.name: getattr(x, f.name) for f in fields(x)})
    return repr(x)


def everything(session):
    """Rows, states, plans and costs of a session, room and rows in flight included."""
    own = [(cache.stores, cache.states, cache.plans) for cache in session.samples]
    return picture([own, session.costs])


@dataclass(frozen=True)
class Nosy(ByParity):
    """Counts how often it is asked and shown a pass."""

    observes: ClassVar[tuple[str, ...]] = ("prefill", "denoise", "commit", "rebuild")

    def pick(self, view, state):
        state["picked"] = state.get("picked", 0) + 1
        return super().pick(view, state)

    def observe(self, view, state):
        state.setdefault("seen", []).append((view.layer, view.step.phase, view.step.rebuild))


SCRATCH = {
    "parts": [
        {"select": Nosy()},
        {"retain": RAGGED, "select": Nosy(), "positions": "contiguous"},
        {"precision": {"part": "aged", "codec": "int8", "age": 1}, "select": Nosy()},
    ],
    "after": ["denoise", "commit"],
}


@pytest.mark.parametrize("parts", SCRATCH["parts"], ids=["plain", "ragged and moved", "coded"])
@pytest.mark.parametrize("after", SCRATCH["after"])
@pytest.mark.parametrize("buffers", ["keep", "remake"])
def test_a_scratch_pass_changes_nothing(parts, after, buffers):
    """After a pass whose plan is in force, and between two chunks; with any frames and phase."""
    session, other = (session_of(policy(**parts), buffers=buffers) for _ in range(2))
    steps = list(passes(4))
    at = next(i for i, s in enumerate(steps) if s.chunk == 2 and s.phase == after) + 1
    for one in (session, other):
        drive(one, steps[:at], 1)
    before, last = everything(session), steps[at - 1]
    for phase, frames, final in (
        ("denoise", last.frames, ()),
        ("denoise", (30,), ()),
        ("commit", last.frames, last.frames),
        ("prefill", (6, 7, 8), ()),
    ):
        step = Pass(phase, frames, (500.0,) * len(frames), 2, 0, final, True, 2, mode="scratch")
        step = replace(step, samples=(0, 0))
        for layer in range(GEOMETRY.layers):
            out = session.attend(layer, *some(size_of(step, 2), layer), step)
            assert out.isfinite().all()
        assert session.finish(step) == []
        assert everything(session) == before
    late = [drive(one, steps[at:], 1, seed=1) for one in (session, other)]
    assert all(torch.equal(a, b) for a, b in zip(*late, strict=True))
    assert session.costs == other.costs
    states = [one.samples[0].states for one in (session, other)]
    assert picture(states[0]) == picture(states[1])


@pytest.mark.parametrize("parts", SCRATCH["parts"], ids=["plain", "ragged and moved", "coded"])
@pytest.mark.parametrize("frames", [(4, 5), (9,)])
def test_queries_of_one_sample_as_a_batch_give_what_each_gives_alone(parts, frames):
    session = session_of(policy(**parts), 2)
    drive(session, list(passes(4))[:7])
    step = Pass("denoise", frames, (500.0,) * len(frames), 2, mode="scratch", samples=(0, 0, 0))
    for layer in range(GEOMETRY.layers):
        x = some(size_of(step, 3), layer)
        together = session.attend(layer, *x, step)
        for row in range(3):
            own = [t[row : row + 1] for t in x]
            alone = session.attend(layer, *own, replace(step, samples=(0,)))
            assert torch.equal(together[row : row + 1], alone)
        other = session.attend(layer, *own, replace(step, samples=(1,)))
        assert not torch.equal(other, alone), "another sample holds other rows"


class InForce(ParityScript):
    """Frames as the chunk's plan says; other frames in flight read all that is held."""

    def reads(self, stream, step, frame, index, row, current):
        if step.mode == "scratch" and step.frames != (4, 5):
            return True
        return super().reads(stream, step, frame, index, row, current)


class MovedInForce(Contiguous, InForce):
    pass


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("frames", [(4, 5), (9,), (20, 21, 22)])
@pytest.mark.parametrize(
    ("parts", "script"),
    [
        ({}, Script),
        ({"positions": STORAGE["raw"]}, Script),
        ({"retain": RAGGED}, RaggedScript),
        ({"select": ByParity()}, InForce),
        ({"retain": WINDOW, "select": ByParity(), "positions": "contiguous"}, MovedInForce),
        ({"retain": Fold(), "bias": "log_weight"}, lambda: FoldScript("raw")),
    ],
    ids=["full", "raw", "ragged", "chosen", "chosen and moved", "merged"],
)
@pytest.mark.thinned(5)
def test_a_scratch_pass_reads_what_is_held_and_its_own_rows(parts, script, frames, backend):
    """By the plan in force where there is one for these frames; else all."""
    session, twin = session_of(policy(**parts), 2, backend=backend), Twin(GEOMETRY, 2, script())
    steps = list(passes(4))[: 11 if "retain" in parts and frames != (4, 5) else 7]
    for one in (session, twin):
        drive(one, steps)
    chunk = steps[-1].chunk
    step = Pass("denoise", frames, (500.0,) * len(frames), chunk, mode="scratch")
    step = replace(step, samples=(1, 0, 1))
    for layer in range(GEOMETRY.layers):
        x = some(size_of(step, 3), layer)
        ours, theirs = (one.attend(layer, *x, step).double() for one in (session, twin))
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


# -- gradients -------------------------------------------------------------------------------

GRADIENTS = {
    "merged": ({"retain": Fold(), "bias": "log_weight"}, lambda: FoldScript("raw")),
    "merged, relative": (
        {
            "retain": Fold(align="relative"),
            "positions": STORAGE["raw"],
            "bias": "log_weight",
        },
        lambda: FoldScript("relative"),
    ),
    "ragged": ({"retain": RAGGED}, RaggedScript),
    "moved": ({"retain": WINDOW, "positions": "contiguous"}, Contiguous),
    "chosen": ({"select": ByParity()}, ParityScript),
}


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.thinned(3)
def test_gradients_of_a_pass_are_right(name, backend):
    """Against finite differences in float64; the values are those of a run-mode pass."""
    parts, script = GRADIENTS[name]
    session, twin = session_of(policy(**parts), backend=backend), Twin(GEOMETRY, 1, script())
    with torch.no_grad():
        drive(session, passes(3), 1, dtype=torch.float64)
        drive(twin, passes(3), 1, dtype=torch.float64)
    step = Pass("denoise", (6,), (500.0,), 3, mode="grad")
    x = [t.requires_grad_() for t in some(size_of(step), 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: session.attend(1, q, k, v, step), x)
    with torch.no_grad():
        found = session.attend(1, *x, step)
        same = session.attend(1, *x, replace(step, mode="run"))
        slow = twin.attend(1, *x, replace(step, mode="run"))
    torch.testing.assert_close(found, same, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, slow, atol=1e-6, rtol=0)


def asked(session, chunk, final=False):
    """A pass with gradients of one chunk, in every layer; its outputs' squares, keys and values."""
    frames = (CHUNK * chunk, CHUNK * chunk + 1)
    step = Pass("denoise", frames, (500.0,) * 2, chunk, opens=True, next_chunk=2, mode="grad")
    if final:
        step = replace(step, phase="commit", final=frames, opens=False)
    total, rows = 0.0, []
    for layer in range(GEOMETRY.layers):
        seed = 10 * chunk + 5 * final + layer
        x = [t.requires_grad_() for t in some(size_of(step), seed, torch.float64)]
        total = total + session.attend(layer, *x, step).square().sum()
        rows += x[1:]
    session.finish(step)
    return total, rows


def reached(total, rows):
    """Whether gradients come to all of some tensors; else none must be asked of any."""
    found = torch.autograd.grad(total, rows, retain_graph=True, allow_unused=True)
    if all(x is None for x in found):
        return False
    assert all(x is not None and bool(x.any()) for x in found)
    return True


@pytest.mark.parametrize("between", [False, True], ids=["at once", "after noisy passes"])
@pytest.mark.parametrize("gradients", [0, 1, 2])
@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
@pytest.mark.parametrize("retain", ["everything", {"part": "window", "budget": "5f"}], ids=str)
def test_gradients_reach_so_many_committed_chunks(retain, positions, gradients, between):
    """Of chunks committed with gradients, in the passes of later ones; also if passes without
    gradients come first. Beyond them nothing of the graph is left."""
    session = session_of(policy(retain, positions=positions), gradients=gradients)
    with torch.no_grad():
        drive(session, [s for s in passes(1) if s.final], 1, dtype=torch.float64)

    def noisy(chunk):
        if between:
            with torch.no_grad():
                steps = [s for s in passes(4) if s.chunk == chunk and not s.final]
                drive(session, steps, 1, dtype=torch.float64)

    noisy(1)
    first = asked(session, 1, final=True)[1]
    noisy(2)
    assert reached(asked(session, 2)[0], first) == (gradients >= 1)
    second = asked(session, 2, final=True)[1]
    noisy(3)
    total = asked(session, 3)[0]
    assert reached(total, second) == (gradients >= 1)
    assert reached(total, first) == (gradients >= 2)


@pytest.mark.parametrize("positions", STORAGE)
def test_passes_of_one_chunk_have_graphs_of_their_own(positions):
    """A pass can be differentiated after the graph of the one before is gone."""
    session = session_of(policy(positions=STORAGE[positions]), gradients=1)
    for chunk in range(2):
        for _ in range(3):
            total, rows = asked(session, chunk)
            total.backward()
            assert all(x.grad.any() for x in rows)
        with torch.no_grad():
            asked(session, chunk, final=True)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"positions": STORAGE["raw"]},
        {"retain": {"part": "window", "budget": "3f"}, "positions": "contiguous"},
        {"retain": Fold(), "bias": "log_weight"},
        {"retain": RAGGED, "select": ByParity()},
    ],
    ids=["full", "raw", "moved", "merged", "ragged and chosen"],
)
def test_gradients_through_committed_rows_are_right(parts):
    """Against finite differences, through the commit and what the policy made of the rows."""
    first, second, third, fourth = (s for s in passes(4) if s.final)
    own = some(size_of(first), 1, torch.float64)

    def run(k, v):
        session = session_of(policy(**parts), gradients=1)
        with torch.no_grad():
            drive(session, (first, second), 1, dtype=torch.float64)
        for layer in range(GEOMETRY.layers):
            session.attend(layer, own[0], k, v, replace(third, mode="grad"))
        session.finish(replace(third, mode="grad"))
        ask = replace(fourth, phase="denoise", final=(), opens=True, mode="grad")
        return session.attend(1, *own, ask)

    inputs = [t.requires_grad_() for t in some(size_of(first), 2, torch.float64)[:2]]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_of_a_run_mode_pass_are_refused(name):
    session, step = session_of(policy()), next(passes())
    x = dict(zip("qkv", some(size_of(step), 0), strict=True))
    x[name].requires_grad_()
    with pytest.raises(ValueError, match=r"mode='run' \(layer 0, chunk 0\).*mode='grad'"):
        session.attend(0, **x, step=step)
    with torch.no_grad():
        session.attend(0, **x, step=step)


@pytest.mark.parametrize("positions", STORAGE)
@pytest.mark.parametrize("wanted", ["qkv", "q"])
def test_later_passes_leave_gradients_alone(positions, wanted):
    """A chunk's last noisy pass with gradients, its commit without; the backward pass comes last.

    The gradients are those without the later passes.
    """
    found = []
    for later in (False, True):
        session = session_of(policy(positions=STORAGE[positions]))
        steps = list(passes(4))
        with torch.no_grad():
            drive(session, steps[:4], 1)
        step = replace(steps[4], mode="grad")
        inputs = []
        total = 0.0
        for layer in range(GEOMETRY.layers):
            x = dict(zip("qkv", some(size_of(step), 3 + layer), strict=True))
            inputs += [x[name].requires_grad_() for name in wanted]
            total = total + session.attend(layer, **x, step=step).square().sum()
        session.finish(step)
        if later:
            with torch.no_grad():
                drive(session, steps[5:], 1)
        total.backward()
        found.append([x.grad for x in inputs])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@dataclass(frozen=True)
class Counted(SelectPart):
    """Counts how often it is asked."""

    def pick(self, view, state):
        state["picked"] = state.get("picked", 0) + 1
        return Selection(frames=view.frame_ids.view(1, 1, -1) % 2 == 0)


@pytest.mark.parametrize("refresh", ["chunk", "pass"])
def test_a_part_is_asked_as_often_with_gradients(refresh):
    asks = []
    for mode in ("run", "grad"):
        session = session_of(policy(select=Counted(refresh=refresh)))
        with torch.no_grad():
            drive(session, [replace(step, mode=mode) for step in passes(3, noisy=3)], 1)
        asks.append(session.samples[0].states["cond"]["select"]["picked"])
    assert asks[0] == asks[1] == GEOMETRY.layers * 3 * (1 if refresh == "chunk" else 4)


# -- who is shown a pass ---------------------------------------------------------------------


@dataclass(frozen=True)
class Witness(RetainPart):
    """Notes every pass that it is shown, and what it looked like."""

    observes: ClassVar[tuple[str, ...]] = ()
    kinds: Any = ()

    def __post_init__(self):
        object.__setattr__(self, "observes", self.kinds)

    def observe(self, view, state):
        assert view.output.shape == (view.heads, view.flight, GEOMETRY.head_dim)
        kind = "rebuild" if view.step.rebuild else view.step.phase
        state.setdefault("seen", []).append((kind, view.layer, view.step.chunk, view.step.step))


@pytest.mark.parametrize(
    "kinds",
    [(), ("prefill",), ("denoise",), ("commit",), ("rebuild",), ("denoise", "rebuild")],
    ids=str,
)
def test_parts_observe_the_passes_that_they_declare(kinds):
    """Every layer once, after attention; scratch passes never."""
    session = session_of(policy(Witness(kinds=kinds)))
    steps = list(passes(3))
    steps = [replace(steps[2], phase="prefill", opens=True), *steps[3:]]
    steps.append(Pass("prefill", (0, 1), (0.0, 0.0), 2, final=(0, 1), rebuild=True))
    done = []
    for step in steps:
        for mode in ("scratch", "run"):
            drive(session, [replace(step, mode=mode)], 1)
        kind = "rebuild" if step.rebuild else step.phase
        done += [(kind, layer, step.chunk, step.step) for layer in range(GEOMETRY.layers)]
    seen = session.samples[0].states["cond"]["retain"].get("seen", [])
    assert seen == [x for x in done if x[0] in kinds]


def test_a_noisy_pass_that_makes_frames_final_is_a_commit_too():
    """Once for each layer, whichever of both was declared."""
    frames = (0, 1)
    step = Pass("denoise", frames, (500.0,) * 2, 0, final=frames, opens=True)
    for kinds in (("denoise",), ("commit",), ("denoise", "commit"), ("prefill",)):
        session = session_of(policy(Witness(kinds=kinds)))
        drive(session, [step], 1)
        seen = session.samples[0].states["cond"]["retain"].get("seen", [])
        assert len(seen) == (0 if kinds == ("prefill",) else GEOMETRY.layers)


@dataclass(frozen=True)
class Weighing(ByParity):
    """Compares mass with a softmax over the chosen rows; of raw tensors, head by head."""

    observes: ClassVar[tuple[str, ...]] = ("denoise", "commit")
    seen: Any = None

    def observe(self, view, state):
        held, own = view.attention(per_query_frame=True, over="read")
        keys = torch.cat([view.keys("read"), view.own_keys()], dim=1).double()
        masks = [x.expand(view.heads, view.query_frames, -1) for x in view.read]
        read = torch.cat([masks[0], masks[1].expand(-1, -1, view.flight)], dim=2)
        values = torch.cat([view.values(), view.own_values()], dim=1).double()
        for h in range(view.heads):
            for q in range(view.query_frames):
                rows = read[h, q].nonzero().flatten()
                query = view.query[h, q * TOKENS : (q + 1) * TOKENS].double()
                share = (query @ keys[h, rows].T / GEOMETRY.head_dim**0.5).softmax(-1)
                expected = torch.zeros(keys.shape[1]).double()
                expected[rows] = share.sum(0)
                found = torch.cat([held[h, q], own[h, q]]).double()
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
                mine = view.output[h, q * TOKENS : (q + 1) * TOKENS].double()
                torch.testing.assert_close(mine, share @ values[h, rows], atol=1e-5, rtol=0)
        self.seen.append(len(rows) < keys.shape[1])


@pytest.mark.parametrize("retain", ["everything", RAGGED], ids=["even", "ragged"])
def test_mass_over_what_was_read_is_a_softmax_over_the_chosen_rows(retain):
    part = Weighing(seen=[])
    session = session_of(policy(retain, select=part))
    drive(session, passes(4), 1)
    assert len(part.seen) == 12 * GEOMETRY.layers and any(part.seen)
    assert session.costs[0].rows_scored == 0, "attention touches these rows anyway"


def test_mass_over_what_was_read_by_several_query_frames_is_asked_for_each():
    @dataclass(frozen=True)
    class Together(ByParity):
        observes: ClassVar[tuple[str, ...]] = ("denoise",)

        def observe(self, view, state):
            view.attention(over="read")

    with pytest.raises(ValueError, match="per_query_frame=True"):
        drive(session_of(policy(select=Together())), passes(2), 1)


def test_only_the_policy_asks_for_rebuilds():
    """Scratch and grad passes return none of their own."""

    @dataclass(frozen=True)
    class Again(RetainPart):
        def commit(self, views, state):
            return Rebuild((0,))

    session = session_of(policy(Again()))
    step = next(s for s in passes(1) if s.final)
    for mode, count in (("scratch", 0), ("grad", 1)):
        here = replace(step, mode=mode)
        for layer in range(GEOMETRY.layers):
            session.attend(layer, *some(size_of(here), 0), here)
        assert len(session.finish(here)) == count
    assert store_of(session).frames == (0, 1)
