"""What a scorer sees: against plain loops, whatever the sampler, and with nothing of the future."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from golden_features import GOLDEN
from slow_features import every_list

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.base import PositionsPart
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.policies.scorer import running
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES, GROUPS, feature_hash
from lightning_kv.policies.scorer.seen import STATS, held_rows
from lightning_kv.testing.candidate import play
from lightning_kv.testing.schedules import chunked, rolling
from lightning_kv.testing.tapes import random_tape

NAMES = tuple(FEATURES)
QUERIES = 5  # of the 18 that a chunk of three frames has


@dataclass(frozen=True)
class Clipped(PositionsPart):
    """No query frame meets a row at more than 4 frames."""

    name: ClassVar[str] = "clipped-at-4"

    def lags(self, view, state, selection=None):
        times = torch.tensor(view.step.query_times, dtype=view.time.dtype).view(1, -1, 1)
        return (times - view.time.unsqueeze(1)).clamp_max(4.0)


@pytest.fixture
def watched(monkeypatch):
    """What parts see at each question: step, frames by layer, features."""
    found, own = [], running.lists_of

    def spy(part, views, state, names):
        made = own(part, views, state, names)
        frames = [(view.layer, view.frames) for view in views]
        found.append((views[0].step, dict(zip(dict(frames), made, strict=True)), dict(frames)))
        return made

    monkeypatch.setattr(running, "lists_of", spy)
    return found


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """Path of an untrained scorer for a tape."""

    def made(tape, **settings):
        settings = {"queries": QUERIES, **settings}
        path = tmp_path_factory.mktemp("scorers") / "scorer.safetensors"
        Scorer.fresh("mlp", tape.geometry, **settings).save(path)
        return str(path)

    return made


def policy_of(path, budget="5f", **others):
    retain = {"part": "distilled", "scorer": path, "budget": budget}
    return policy_from_dict({"name": "mine", "retain": retain, **others})


def numbers(watched, namespace="cond"):
    """Features and context by chunk, layer, head and frame, of candidates alone."""
    found = {}
    for step, listed, frames in watched:
        if step.namespace != namespace:
            continue
        for layer, own in listed.items():
            for head, line in enumerate(own.candidate.tolist()):
                rows = {
                    frame: own.features[head, place]
                    for place, frame in enumerate(frames[layer])
                    if line[place]
                }
                found[step.chunk, layer, head] = rows, own.context[head]
    return found


SHARES = [[0.6, 1.0, 1.4], [1.4, 0.6, 1.0]]
UNEVEN = {"part": "table", "amount": "5f", "shares": SHARES}
SIZES = {"dtype": torch.float64, "gain": 3.0}


def in_threes(tape):
    """Whatever was given at once, what is made comes in chunks of three."""
    return replace(tape, geometry=replace(tape.geometry, chunk=3))


TAPES = {
    "chunks": lambda: random_tape(chunked((3,) * 6, 1), **SIZES),
    "a short last chunk": lambda: random_tape(chunked((3, 3, 3, 3, 2), 1), **SIZES),
    "given frames": lambda: random_tape(chunked((2,) * 6, 1, context=3), grid=(1, 4), **SIZES),
    "a long prefill": lambda: in_threes(
        random_tape(chunked((6, 3, 3, 3, 3), 1, context=1), grid=(1, 4), **SIZES)
    ),
    "rolling": lambda: random_tape(rolling(2, 12, 3), grid=(1, 4), **SIZES),
    "a switch": lambda: random_tape(
        chunked((3,) * 6, 1), events=(Event("prompt_switch", 9, "x"),), **SIZES
    ),
}
CASES = [
    *((name, "7f" if "prefill" in name else "5f", "absolute") for name in TAPES),
    ("chunks", UNEVEN, "absolute"),
    ("rolling", UNEVEN, "absolute"),
    ("chunks", "5f", "clipped-at-4"),
    ("rolling", "5f", "clipped-at-4"),
]


def clipped(frame, query, start):
    return query - min(query - frame, 4)


@pytest.mark.parametrize(("name", "budget", "positions"), CASES)
def test_features_are_those_of_plain_loops(watched, scorer, name, budget, positions):
    tape = TAPES[name]()
    policy = policy_of(scorer(tape), budget, positions=positions)
    decisions = play(policy, tape).decisions
    spots = decisions.kept.items()
    kept = {(key[4], *key[2:4]): {row[0] for row in rows} for key, rows in spots}
    each = (
        [[5 * x for x in row] for row in SHARES] if budget is UNEVEN else [[int(budget[0])] * 3] * 2
    )
    read = {} if positions == "absolute" else {"read": clipped}
    slow = every_list(tape, kept, each, QUERIES, **read)
    found = numbers(watched)
    assert len(found) >= 12
    for place, (rows, context) in found.items():
        theirs, around = slow[place]
        assert rows.keys() == theirs.keys()
        for frame, own in rows.items():
            wanted = torch.tensor([theirs[frame][feature] for feature in NAMES])
            torch.testing.assert_close(own, wanted, atol=2e-5, rtol=1e-4)
        wanted = torch.tensor([around[feature] for feature in CONTEXT])
        torch.testing.assert_close(context, wanted, atol=2e-5, rtol=1e-4)


def played(watched, path, tape, **others):
    """What is seen on a tape, from the start."""
    watched.clear()
    play(policy_of(path, **others), tape)
    return numbers(watched)


def assert_same(ours, theirs, atol=0.0):
    assert ours.keys() == theirs.keys() and len(ours) >= 6
    for place, (rows, context) in ours.items():
        others, around = theirs[place]
        for own, other in zip(rows.values(), others.values(), strict=True):
            torch.testing.assert_close(own, other, atol=atol, rtol=0)
        torch.testing.assert_close(context, around, atol=atol, rtol=0)


def later(entry, by):
    """A pass so many frames later."""
    step = entry.step
    frames, final = (tuple(f + by for f in own) for own in (step.frames, step.final))
    return replace(entry, step=replace(step, frames=frames, final=final))


@pytest.mark.parametrize("name", ["chunks", "a short last chunk"])
def test_a_shift_of_all_times_changes_nothing(watched, scorer, name):
    tape = TAPES[name]()
    shifted = replace(tape, entries=tuple(later(entry, 999) for entry in tape.entries))
    path = scorer(tape)
    assert_same(played(watched, path, tape), played(watched, path, shifted), 1e-5)


@pytest.mark.parametrize("name", ["chunks", "a switch"])
def test_what_comes_later_changes_nothing(watched, scorer, name):
    tape, until = TAPES[name](), 4
    path, rng = scorer(tape), torch.Generator().manual_seed(3)

    def noise(entry):
        layers = tuple(
            tuple(torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in own)
            for own in entry.layers
        )
        return replace(entry, layers=layers) if entry.step.chunk > until else entry

    other = replace(tape, entries=tuple(map(noise, tape.entries)))
    ours, theirs = (played(watched, path, x) for x in (tape, other))
    early = [place for place in ours if place[0] <= until]
    assert_same({x: ours[x] for x in early}, {x: theirs[x] for x in early})
    assert any(not ours[x][1].equal(theirs[x][1]) for x in ours.keys() - set(early))


def test_noisy_passes_change_nothing(watched, scorer):
    tape = TAPES["chunks"]()
    path = scorer(tape)
    clean = replace(tape, entries=tuple(e for e in tape.entries if e.step.clean))
    assert_same(played(watched, path, tape), played(watched, path, clean))


def test_heads_are_seen_in_whatever_order(watched, scorer):
    tape, order = TAPES["chunks"](), [2, 0, 1]
    path = scorer(tape)
    entries = tuple(
        replace(e, layers=tuple(tuple(x[:, :, order] for x in own) for own in e.layers))
        for e in tape.entries
    )
    ours = played(watched, path, tape)
    theirs = played(watched, path, replace(tape, entries=entries))
    moved = {(chunk, layer, order[head]): own for (chunk, layer, head), own in theirs.items()}
    assert_same(ours, moved, 1e-6)


def both_branches(tape):
    """The same passes in two namespaces; in the second, queries and keys are others."""
    entries = []
    for e in tape.entries:
        other = tuple((q.flip(1), k.flip(1), v) for q, k, v in e.layers)
        entries.append(e)
        entries.append(replace(e, step=replace(e.step, namespace="uncond"), layers=other))
    return replace(tape, entries=tuple(entries), geometry=replace(tape.geometry, branches=2))


@pytest.mark.parametrize("branches", ["each", "shared"])
def test_branches_under_guidance_are_seen_apart(watched, scorer, branches):
    tape = TAPES["chunks"]()
    path = scorer(tape)
    alone = played(watched, path, tape)
    both = played(watched, path, both_branches(tape), branches=branches)
    assert_same(alone, both)
    other = numbers(watched, "uncond")
    assert len(other) == (len(alone) if branches == "each" else 0)
    assert all(not own[1].equal(alone[place][1]) for place, own in other.items())


@pytest.mark.parametrize("group", [*GROUPS])
def test_features_that_are_left_out_change_no_others(watched, scorer, group):
    tape = TAPES["chunks"]()
    names = tuple(name for name in FEATURES if name not in GROUPS[group] or name == "total-mass")
    whole = played(watched, scorer(tape), tape)
    some = played(watched, scorer(tape, features=names), tape)
    index = [NAMES.index(name) for name in names]
    assert_same(
        {x: ({f: own[index] for f, own in rows.items()}, c) for x, (rows, c) in whole.items()}, some
    )


def test_rows_that_come_back_are_what_they_were(scorer):
    """What is found in memory is what was seen when a frame was made."""
    tape = TAPES["chunks"]()
    session = tape.session(policy_of(scorer(tape), "9f"))
    for step, _ in tape.running(session):
        if step.chunk == 2 and step.final:
            break
    seen = session.samples[0].states["cond"]["retain"]["seen"].spread()
    norms = [STATS.index(name) for name in ("key", "spread", "value")]
    for view in session.samples[0].views(step):
        found = held_rows(view, view.frames[::-1])
        assert found.frames == seen.frames[view.layer][::-1]
        for ours, theirs in (
            (found.keys, seen.keys),
            (found.values, seen.values),
            (found.norms, seen.stats[..., norms]),
        ):
            torch.testing.assert_close(ours.flip(1), theirs[view.layer], atol=1e-6, rtol=1e-6)


# -- golden ----------------------------------------------------------------------------------


def test_definitions_do_not_drift(watched, scorer):
    """Where these numbers change, the version of a definition must, and every hash with it."""
    assert feature_hash(NAMES) == GOLDEN["hash"]
    tape = random_tape(chunked((3,) * 5, 1), layers=1, heads=1, **SIZES)
    rows, context = played(watched, scorer(tape), tape)[4, 0, 0]
    assert [*rows] == GOLDEN["frames"]
    for place, name in enumerate(NAMES):
        own = [float(row[place]) for row in rows.values()]
        assert own == pytest.approx(GOLDEN[name], abs=2e-4), name
    for number, name in zip(context.tolist(), CONTEXT, strict=True):
        assert number == pytest.approx(GOLDEN[f"context {name}"], abs=2e-4), name
