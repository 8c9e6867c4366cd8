"""What is remembered between passes holds no longer than what it was made of, and no part can
spoil what others see; wrong numbers are refused before they are written.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rules import RAGGED, TOKENS
from sessions import CHUNK, GEOMETRY, drive, passes, policy, rolling, store_of, stream_of

from lightning_kv import rollout
from lightning_kv.cache.decisions import Event, Rebuild, Retention, Selection, Sums
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.samplers import spaced
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.base import PositionsPart, RetainPart, SelectPart
from lightning_kv.policies.registry import build_budget
from lightning_kv.policies.retain.window import Window
from lightning_kv.testing import chunked

LAYERS, HEADS, WIDTH = GEOMETRY.layers, GEOMETRY.heads, GEOMETRY.head_dim
SIZES = replace(GEOMETRY, chunk=CHUNK, flight=CHUNK)


def opened(made, geometry=SIZES, **settings):
    return CacheSession(geometry, made, (0,), **settings)


def outputs(session, steps=None, **settings):
    return drive(session, list(steps or passes()), batch=1, **settings)


def assert_close(ours, theirs, atol=2e-5):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, i=i: f"call {i}: {m}")


@dataclass(frozen=True)
class Asked(SelectPart):
    """Answers what a function of the view says, and lets another look at every commit."""

    observes: ClassVar[tuple[str, ...]] = ("commit",)
    question: Any = None
    look: Any = None

    def pick(self, view, state):
        return self.question(view) if self.question else None

    def observe(self, view, state):
        if self.look:
            self.look(view)


@dataclass(frozen=True)
class Draw(RetainPart):
    """At one commit, every head keeps so many rows drawn for itself."""

    rows: tuple[int, ...] = ()
    chunk: int = 1

    def commit(self, views, state):
        if views[0].step.chunk != self.chunk:
            return None
        return [Retention(keep=torch.stack(self.masks(len(view)))) for view in views]

    def masks(self, size):
        out = []
        for head, count in enumerate(self.rows):
            order = torch.randperm(size, generator=torch.Generator().manual_seed(head))
            out.append(torch.zeros(size, dtype=torch.bool).index_fill(0, order[:count], True))
        return out


@dataclass(frozen=True)
class Lacking(RetainPart):
    """Heads become unlike: the first forgets frame 0, the second some rows of frame 1."""

    def commit(self, views, state):
        out = []
        for view in views:
            keep = view.valid.expand(HEADS, -1).clone()
            keep[0] &= view.frame_id.expand(HEADS, -1)[0] != 0
            gone = (view.frame_id == 1) & (view.raster % 3 == 0)
            keep[1] &= ~gone.expand(HEADS, -1)[1]
            out.append(Retention(keep=keep))
        return out


# -- what is remembered ----------------------------------------------------------------------


@pytest.mark.parametrize("score", ["logit", "lse"])
@pytest.mark.parametrize(
    "positions", [{"part": "sink-lag", "sink": 3, "lag": 7, "to": "end"}, {"part": "clamp"}]
)
def test_focused_meets_keys_where_they_are_read_in_every_pass(positions, score):
    """Passes over one memory, of several chunks and of one, move rows to other times."""
    select = {"part": "focused", "budget": "3f", "score": score}

    def run(forget):
        made = policy(select=select, positions=positions)
        session = opened(made, replace(SIZES, flight=2 * CHUNK))

        def check(step):
            if forget:
                state = session.samples[0].states["cond"]["select"]
                for name in [name for name in state if name != "budget"]:
                    del state[name]

        return outputs(session, rolling(8), check=check)

    assert_close(run(False), run(True), atol=0)


@pytest.mark.parametrize("branches", ["each", "shared"])
def test_answers_are_remembered_only_where_a_branch_follows(branches):
    made = policy(
        retain={"part": "window", "budget": "4f"},
        precision={"part": "aged", "codec": "int8", "age": 2},
    )
    session = opened(replace(made, branches=branches))
    outputs(session)
    said = session.samples[0]._said
    assert set(said) == (set() if branches == "each" else {"event", "commit", "recode"})


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
def test_kept_buffers_and_gradients_into_memory_give_the_same_outputs(positions):
    """Noisy passes without gradients keep copies; the commit passes let gradients through."""

    def run(**settings):
        made = policy(select={"part": "random", "budget": "3f"}, positions=positions)
        session, out = opened(made, gradients=9, **settings), []
        rng = torch.Generator().manual_seed(0)
        for step in passes():
            with torch.set_grad_enabled(bool(step.final)):
                step = replace(step, mode="grad" if step.final else "run")
                for layer in range(LAYERS):
                    shape = (1, len(step.frames) * TOKENS, HEADS, WIDTH)
                    q, k, v = (torch.randn(shape, generator=rng) for _ in range(3))
                    k.requires_grad_(bool(step.final))
                    out.append(session.attend(layer, q, k, v, step).detach())
                session.finish(step)
        assert store_of(session).live
        return out

    kept = run(buffers="keep")
    assert_close(kept, run(buffers="remake"), atol=1e-6)
    assert_close(kept, run(backend="reference"))


def test_gradients_reach_the_rows_of_the_last_chunks_however_short_the_last_is():
    session = opened(policy(), replace(SIZES, chunk=3, flight=3), gradients=2)
    rng, given = torch.Generator().manual_seed(0), []
    for step in chunked((3, 3, 1), noisy=0):
        shape = (1, len(step.frames) * TOKENS, HEADS, WIDTH)
        for layer in range(LAYERS):
            q, k, v = (torch.randn(shape, generator=rng) for _ in range(3))
            session.attend(layer, q, k.requires_grad_(), v.requires_grad_(), _grad(step))
            if layer == 0:
                given.append((k, v))
        session.finish(_grad(step))
    (group,) = store_of(session).memory.groups
    for which, name in enumerate("kv"):
        own = [pair[which] for pair in given]
        share = group.payload(name).square().sum() / 2  # its gradient is the row itself, turned
        found = torch.autograd.grad(share, own, allow_unused=True)
        assert found[0] is None or not found[0].any()
        for x, gradient in zip(own[1:], found[1:], strict=True):
            torch.testing.assert_close(gradient, x, atol=1e-5, rtol=0)


def _grad(step):
    return replace(step, mode="grad")


def test_kept_buffers_hold_no_decoded_rows():
    made = {"select": {"part": "random", "budget": "3f"}}
    coded = made | {"precision": {"part": "aged", "codec": "int4", "age": 2}}

    def run(parts, **settings):
        session = opened(policy(**parts), **settings)
        sizes = []

        def check(step):
            for plan in session.samples[0].plans.values():
                for block in plan.blocks:
                    group = store_of(session).memory.groups[block.group]
                    sizes.append((len(group.coded), len(block.kept)))

        return outputs(session, check=check), sizes

    out, sizes = run(coded, buffers="keep")
    assert any(codes for codes, _ in sizes)
    assert not any(kept for codes, kept in sizes if codes)
    assert any(kept for _, kept in run(made, buffers="keep")[1])
    assert_close(out, run(coded)[0], atol=1e-6)
    assert_close(out, run(coded, backend="reference")[0])


# -- every head has its own rows -------------------------------------------------------------

WIDE = replace(SIZES, layers=1, grid=(10, 25))
COUNT = 701  # of 1000: no number that bfloat16 has


@pytest.mark.parametrize(
    "retain",
    [
        Draw(rows=(COUNT,) * HEADS),
        Draw(rows=(COUNT, COUNT - 2, COUNT)),
        {"part": "heavy-hitters", "granularity": "token", "budget": f"{COUNT}t"},
    ],
    ids=["drawn", "ragged", "heavy-hitters"],
)
def test_under_autocast_every_head_keeps_its_own_rows(retain):
    def run(low):
        session, rng, out = opened(policy(retain=retain), WIDE), torch.Generator(), []
        rng.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            for step in passes(3, noisy=1):
                shape = (1, len(step.frames) * WIDE.tokens, HEADS, WIDTH)
                q, k, v = (torch.randn(shape, generator=rng) for _ in range(3))
                out.append(session.attend(0, q, k, v, step))
                session.finish(step)
                if step.final and step.chunk == 1:
                    rows = [stream_of(store_of(session).memory, h) for h in range(HEADS)]
        return out, rows

    (plain, rows), (low, same) = run(False), run(True)
    assert_close(low, plain, atol=0)
    for head, (a, b) in enumerate(zip(rows, same, strict=True)):
        assert all(torch.equal(a[name], b[name]) for name in a)
        if isinstance(retain, Draw):
            wanted = retain.masks(2 * CHUNK * WIDE.tokens)[head].nonzero().flatten()
            row, column = b["place"].long().unbind(-1)
            found = b["frame_id"].long() * WIDE.tokens + row * WIDE.grid[1] + column
            assert torch.equal(found, wanted)
    assert not torch.equal(same[0]["v"], same[2]["v"])


@pytest.mark.parametrize("retain", [Lacking(), RAGGED], ids=["tokens", "frames"])
def test_all_rows_selected_of_unlike_heads_are_those_that_they_hold(retain):
    every = Asked(question=lambda view: Selection(rows=torch.ones(1, 1, len(view)) > 0))
    ours = outputs(opened(policy(retain=retain, select=every)))
    masked = opened(policy(retain=retain, select=every), backend="reference")
    assert_close(ours, outputs(masked))
    assert_close(ours, outputs(opened(policy(retain=retain), backend="reference")))
    assert len(set(store_of(masked).memory.lengths)) > 1


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("retain", [Lacking(), RAGGED], ids=["tokens", "frames"])
def test_logits_of_unlike_heads_are_put_together_frame_by_frame(retain, how):
    seen = []

    def look(view):
        if not view.ragged:
            return
        logits = view.logits(view.query)[..., : len(view)]
        found = view.by_frame(logits, how)
        assert found.shape == (HEADS, view.flight, len(view.frames))
        ids = view.frame_id.expand(HEADS, -1)
        for head in range(HEADS):
            keys = view.keys()[head].double()
            for at, frame in enumerate(view.frames):
                rows = [r for r in range(view.lengths[head]) if int(ids[head, r]) == frame]
                wanted = torch.zeros(view.flight, dtype=torch.float64)
                for row in rows:
                    wanted += view.query[head].double() @ keys[row] / WIDTH**0.5
                if how == "mean" and rows:
                    wanted /= len(rows)
                torch.testing.assert_close(found[head, :, at].double(), wanted, atol=1e-5, rtol=0)
                seen.append(len(rows))

    outputs(opened(policy(retain=retain, select=Asked(look=look))))
    assert 0 in seen and len(set(seen)) > 1


@pytest.mark.parametrize("masked", [False, True])
def test_the_mass_over_what_is_read_counts_the_bias(masked):
    rng, seen = torch.Generator().manual_seed(0), []

    def question(view):
        bias = 3 * torch.randn(HEADS, CHUNK, len(view) + view.flight, generator=rng)
        rows = torch.rand(HEADS, 1, len(view), generator=rng) > 0.5 if masked else None
        return Selection(rows=rows, bias=bias)

    def look(view):
        keys = torch.cat([view.keys(), view.own_keys()], 1).double()
        logits = view.query.double() @ keys.transpose(1, 2) / WIDTH**0.5
        logits = logits.unflatten(1, (CHUNK, -1)) + view.selection.bias.double().unsqueeze(2)
        if masked:
            own = torch.ones(HEADS, 1, view.flight, dtype=torch.bool)
            read = torch.cat([view.selection.rows, own], 2).unsqueeze(2)
            logits = logits.masked_fill(~read, -torch.inf)
        share = logits.softmax(-1)
        values = torch.cat([view.values(), view.own_values()], 1).double()
        out = (share @ values.unsqueeze(1)).flatten(1, 2)
        torch.testing.assert_close(view.output.double(), out, atol=1e-5, rtol=0)
        found = torch.cat(view.attention(per_query_frame=True, over="read"), -1)
        torch.testing.assert_close(found.double(), share.sum(2), atol=1e-5, rtol=0)
        seen.append(len(view))

    outputs(opened(policy(select=Asked(question=question, look=look))))
    assert seen[-1] > 0


def test_the_mass_over_what_is_read_counts_one_bias_for_all_queries():
    rng, seen = torch.Generator().manual_seed(0), []

    def question(view):
        return Selection(bias=3 * torch.randn(1, 1, len(view) + view.flight, generator=rng))

    def look(view):
        keys = torch.cat([view.keys(), view.own_keys()], 1).double()
        logits = view.query.double() @ keys.transpose(1, 2) / WIDTH**0.5
        wanted = (logits + view.selection.bias.double()).softmax(-1).sum(1, keepdim=True)
        found = torch.cat(view.attention(over="read"), -1)
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
        seen.append(len(view))

    outputs(opened(policy(select=Asked(question=question, look=look))))
    assert seen[-1] > 0


# -- parts look and do not touch -------------------------------------------------------------

SHOWN = {
    "query": lambda view: view.query,
    "raw_query": lambda view: view.raw_query,
    "own_keys": lambda view: view.own_keys(),
    "raw own_keys": lambda view: view.own_keys("raw"),
    "own_values": lambda view: view.own_values(),
}


@pytest.mark.parametrize("moment", ["pick", "observe"])
@pytest.mark.parametrize("name", SHOWN)
def test_a_part_that_writes_to_what_the_pass_shows_is_refused(name, moment):
    def write(view):
        SHOWN[name](view).mul_(2)

    def read(view):
        SHOWN[name](view).mul(2)

    settings = {"question" if moment == "pick" else "look": write}
    with pytest.raises(ValueError, match=r"The select part 'Asked' \(layer 0.*clone"):
        outputs(opened(policy(select=Asked(**settings))))
    settings = dict.fromkeys(settings, read)
    assert_close(outputs(opened(policy(select=Asked(**settings)))), outputs(opened(policy())), 0)


def test_a_part_that_writes_to_its_frame_ids_changes_nothing_for_others():
    retain, select = {"part": "window", "sink": 1, "budget": "3f"}, {"part": "focused"}
    select |= {"budget": "2f"}

    def run():
        return outputs(opened(policy(retain=retain, select=select, positions="contiguous")))

    before = run()
    outputs(opened(policy(retain=retain, select=Asked(question=blanked))))
    assert_close(run(), before, atol=0)


def blanked(view):
    view.frame_ids.zero_()


# -- numbers that are none -------------------------------------------------------------------


@dataclass(frozen=True)
class WrongLags(PositionsPart):
    """Lags of the second layer are no numbers."""

    value: float = 0.0

    def lags(self, view, state, selection=None):
        lag = (view.step.query_times[0] - view.time).unsqueeze(1)
        return lag + self.value if view.layer == 1 else lag


@dataclass(frozen=True)
class Wrong(RetainPart):
    """One number of the second layer's answer is none."""

    columns: ClassVar[dict[str, str]] = {"mark": "sum"}
    field: str = ""
    value: float = 0.0

    def commit(self, views, state):
        return [self.answer(view) if view.step.chunk == 1 else None for view in views]

    def answer(self, view):
        fields = {"time": view.time, "place": view.place, "weight": view.weight}
        value = self.value if view.layer == 1 else 0.0
        if self.field == "write":
            return Retention(write={"mark": spoilt(view.weight, value)})
        if not self.field.startswith("sums."):
            return Retention(**{self.field: spoilt(fields[self.field], value)})
        made = {name: x[:, :2].clone() for name, x in fields.items()}
        made["correction"] = torch.zeros(1, 2, WIDTH)
        name = self.field.removeprefix("sums.")
        made[name] = spoilt(made[name], value)
        pair = torch.arange(2).unsqueeze(0)
        ids = view.frame_id[:, :2].long()
        return Retention(sums=Sums(pair, pair, torch.ones(1, 2), ids, **made))


def spoilt(x, value):
    x = x.clone()
    x.flatten()[-1] += value
    return x


FIELDS = ["time", "place", "weight", "write"]
FIELDS += [f"sums.{name}" for name in ("time", "place", "weight", "correction")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", FIELDS)
def test_answers_that_are_no_numbers_are_refused_at_the_commit(field, value):
    session, steps = opened(policy(retain=Wrong(field=field, value=value))), list(passes(2))
    outputs(session, steps[:-1])
    with pytest.raises(ValueError, match=r"The retain part 'Wrong' \(layer 1, chunk 1\).*finite"):
        outputs(session, steps[-1:])
    for layer in range(LAYERS):  # nothing of it has been written
        for group in store_of(session, layer).memory.groups:
            assert all(bool(x.isfinite().all()) for x in group.meta.values())
            assert all(bool(group.payload(name).isfinite().all()) for name in "kv")
    outputs(opened(policy(retain=Wrong(field=field))), passes(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lags_that_are_no_numbers_are_refused_at_the_next_commit(value):
    session, steps = opened(policy(positions=WrongLags(value))), list(passes(2))
    outputs(session, [step for step in steps if step.chunk == 0])
    match = r"The positions part 'WrongLags' \(layer 1, chunk 1\).*finite"
    with pytest.raises(ValueError, match=match):
        outputs(session, [step for step in steps if step.chunk == 1])
    outputs(opened(policy(positions=WrongLags())), steps)


@dataclass(frozen=True)
class Heavy(Window):
    """A window whose state is a tensor of so many bytes."""

    bytes: int = 0

    def fresh(self):
        return {"table": torch.zeros(self.bytes, dtype=torch.uint8)}


def test_state_that_leaves_less_than_the_protected_frames_is_refused():
    sink, state = 3, 5000
    frame = (2 * WIDTH * 4 + 20) * LAYERS * HEADS * TOKENS  # keys, values and fields of a row
    least = (sink + CHUNK) * frame + state

    def run(amount, **settings):
        part = Heavy(budget=build_budget(f"{amount}B"), sink=sink, bytes=state, **settings)
        made = policy(retain=part)
        made.check(SIZES, CHUNK, 10)  # what the state takes is not known beforehand
        session = opened(made)
        outputs(session)
        return store_of(session).frames

    assert run(least) == (0, 1, 2)
    assert run(least + frame) == (0, 1, 2, 9)
    with pytest.raises(ValueError, match=rf"(?s)The retain part 'window' \(layer 0.*{state} fixed"):
        run(least - 1)


# -- two branches ----------------------------------------------------------------------------

TINY = WanConfig(
    dim=24,
    ffn_dim=48,
    layers=2,
    heads=2,
    channels=3,
    text_dim=10,
    text_len=7,
    latent_size=(4, 6),
    train_horizon=21,
    chunk=3,
    sampler="flow",
    timesteps=spaced(2, 5.0),
    guidance=2.0,
)


def encoder(prompts):
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(map(ord, prompt)) + 1)
        rows.append(10 * torch.randn(3, 10, generator=rng, dtype=torch.float64))
    return torch.stack(rows)


def guided(made, frames=15, **settings):
    """A rollout of a tiny model whose branches meet other texts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CausalWan(TINY).double().eval()
    model = VideoModel(network, None, encoder)
    return rollout(model, made, "a cat", frames, decode=False, **settings)


@dataclass(frozen=True)
class Anew(RetainPart):
    """Once, the last frames are encoded again as soon as a chunk is final."""

    def commit(self, views, state):
        if views[0].step.chunk != 2:
            return None
        return Rebuild(tuple(views[0].frames[-6:]))


@dataclass(frozen=True)
class Newest(SelectPart):
    """Reads the newest frames, and says so in every pass."""

    refresh: str = "pass"

    def pick(self, view, state):
        return Selection(frames=view.frames[-4:])


RECACHE = {"part": "window", "sink": 1, "budget": "6f", "switch": "recache"}
REBUILDING = {
    "contiguous": {"retain": RECACHE, "positions": "contiguous"},
    "absolute": {"retain": RECACHE, "positions": "absolute"},
    "every pass": {"retain": Anew(), "select": Newest()},
    "every pass, contiguous": {"retain": Anew(), "select": Newest(), "positions": "contiguous"},
}


@pytest.mark.parametrize("parts", REBUILDING.values(), ids=REBUILDING)
def test_branches_that_would_decide_alike_may_share_rebuilds(parts):
    """What is decided by age alone is the same for both branches."""
    events = [Event("prompt_switch", 9, "two dogs")]
    outs = []
    for branches in ("each", "shared"):
        made = replace(policy(**parts), branches=branches)
        outs.append(guided(made, events=events))
        (cache,) = outs[-1].session.samples
        assert set(cache.stores) == {"cond", "uncond"}
        assert ("uncond" in cache.states) == (branches == "each")
    each, shared = outs
    torch.testing.assert_close(shared.latents, each.latents, atol=1e-9, rtol=0)
    assert shared.rebuilds == each.rebuilds > 0
    assert shared.costs[0].rows_read == each.costs[0].rows_read


@dataclass(frozen=True)
class Shown(SelectPart):
    """Writes down what it is shown beside the passes."""

    def on_prediction(self, step, timestep, x0, state):
        state.setdefault("predictions", []).append((step.namespace, step.chunk, step.step))

    def on_final(self, x0, state):
        state.setdefault("final", []).append(x0.clone())


@pytest.mark.parametrize("branches", ["each", "shared"])
def test_every_branch_that_decides_is_shown_predictions_and_final_latents(branches):
    made = replace(policy(select=Shown()), branches=branches)
    out = guided(made, frames=9)
    states = out.session.samples[0].states
    assert set(states) == ({"cond", "uncond"} if branches == "each" else {"cond"})
    for namespace, parts in states.items():
        state, steps = parts["select"], len(TINY.timesteps)
        wanted = [(namespace, chunk, step) for chunk in range(3) for step in range(steps)]
        assert state["predictions"] == wanted
        assert len(state["final"]) == 3
        assert torch.equal(torch.cat(state["final"]), out.latents[0])
