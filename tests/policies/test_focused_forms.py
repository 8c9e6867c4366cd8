"""Focused Forcing as its authors run it on three backbones, pick by pick."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import slow_focused

from lightning_kv.policies.registry import load_policy, presets
from lightning_kv.testing import chunked, random_tape, rolling


def importance(layers, heads, seed=0):
    """A table of random importances."""
    rng = random.Random(seed)
    return [[rng.uniform(0.17, 0.30) for _ in range(heads)] for _ in range(layers)]


FORMS = {
    "focused-forcing-paper": (slow_focused.SelfForcing, 4, 9, 0.5),
    "focused-forcing-paper-longlive": (slow_focused.LongLive, 4, 12, 0.46),
    "focused-forcing-paper-rolling": (slow_focused.RollingForcing, 4, 12, 0.46),
}


def made(name, table):
    """The preset with another table of importances."""
    parts = presets()[name].parts
    select = parts["select"]
    budget = select["budget"] | {"importance": table}
    return load_policy({"name": name, **parts, "select": select | {"budget": budget}})


def picks(policy, tape):
    """Frames that the session reads, named as the twin names them."""
    found = {}

    def watch(view):
        step, shape = view.step, (view.heads, view.query_frames, -1)
        held, own = view.read
        held = view.valid.unsqueeze(1) if held is None else held
        own = held.new_ones(1, 1, view.flight) if own is None else own
        flight = torch.tensor(step.frames).repeat_interleave(view.geometry.tokens)
        ids = view.frame_id.expand(view.heads, -1)
        for head, lines in enumerate(zip(held.expand(shape), own.expand(shape), strict=True)):
            for i, (past, now) in enumerate(zip(*lines, strict=True)):
                when = (step.chunk, step.phase, step.step, step.start, step.frames[i])
                read = {*ids[head][past].tolist(), *flight[now].tolist()}
                found[(view.layer, head, *when)] = read

    tape.play(tape.session(policy, watch=watch))
    return found


LONG = [pytest.param(n, marks=pytest.mark.slow) for n in (15, 18, 30, 60, 126)]


@pytest.mark.parametrize("frames", [21, *LONG])
@pytest.mark.parametrize("name", FORMS)
def test_every_pick_is_that_of_the_release(name, frames):
    """All before the selection starts, chosen ones after it; noisy passes and commits; float64."""
    twin, least, most, weight = FORMS[name]
    several = "rolling" in name
    steps = rolling(3, frames, 5) if several else chunked((3,) * (frames // 3), 2)
    layers, heads = (1, 2 if several else 4) if frames == 21 else (2, 3)
    table = importance(layers, heads, seed=frames)
    sizes = {"layers": layers, "heads": heads, "grid": (2, 2), "gain": 1.0}
    tape = random_tape(steps, **sizes, dtype=torch.float64, seed=frames)
    theirs = twin(tape, slow_focused.budgets(table, least, most), weight).picks()
    ours = picks(made(name, table), tape)
    assert ours.keys() == theirs.keys() and len(ours) >= 200
    wrong = [key for key in ours if ours[key] != theirs[key]]
    assert not wrong, f"{len(wrong)} of {len(ours)}"
    chosen = {len(read) for key, read in theirs.items() if key[2] >= 6}
    assert frames < 21 or chosen <= set(range(least, most + 1))


@pytest.mark.parametrize("name", FORMS)
def test_a_model_of_another_shape_is_told_what_works(name):
    """The head importances are those of causal Wan 1.3B."""
    policy = load_policy(name)
    tape = random_tape()
    with pytest.raises(ValueError, match=r"another model.*2 layers of 3 heads.*`focused-forcing`"):
        policy.check(tape.geometry, 3, 24)
    policy.check(replace(tape.geometry, layers=30, heads=12), 3, 24)


def test_the_importances_are_rounded_as_they_should_be():
    """Those of the release to five digits: 0.2179957796, 0.226453826 and the extremes."""
    rows = load_policy("focused-forcing-paper").select.budget.importance.rows
    assert (rows[15][2], rows[29][9], rows[0][10], rows[0][0]) == (0.218, 0.22645, 0.17009, 0.30059)


def test_those_of_one_model_can_be_left_out():
    assert set(FORMS) <= set(presets()) - set(presets(any_model=True))
    assert "focused-forcing" in presets(any_model=True)
