"""Recomputed memory against plain Python: which frames, at which times, and at what price."""

import pytest
import torch

from lightning_kv import load_model, preset, rollout
from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
    without_commits,
)


class RecomputeScript(Script):
    """The method once more."""

    def __init__(self, frames):
        self.frames = frames

    def commit_all(self, streams, step):
        made = step.final[-1] + 1
        return self.again(made) if made > self.frames else None

    def event(self, event, streams, step):
        if event.kind == "prompt_switch" and step.start > 0:
            return self.again(step.start)
        return None

    def again(self, made):
        frames = list(range(made))
        if made > self.frames:
            frames = [0, *frames[made - self.frames + 1 :]]
        times = tuple(float(made - len(frames) + i) for i in range(len(frames)))
        return Rebuild(tuple(frames), times=times)


def policy(frames, **settings):
    part = {"part": "recompute", "budget": f"{frames}f"}
    return policy_from_dict({"name": "x", "retain": part, **settings})


SWITCH = (Event("prompt_switch", 6, "another"), Event("prompt_switch", 24, "a third"))
SMALL = {"heads": 2, "batch": 2, "grid": (1, 2)}
CASES = {
    "the release": (3, chunked([3] * 14, noisy=1), SMALL),
    "a prompt switch": (5, chunked([3] * 14, noisy=1), SMALL | {"events": SWITCH}),
    "single frames": (4, chunked([1] * 26, noisy=1), SMALL | {"grid": (2, 2)}),
    "pairs, given chunks": (2, chunked([2] * 14, noisy=1, context=2), SMALL | {"grid": (1, 3)}),
    "short last chunk": (7, chunked([4] * 13 + [2], noisy=1), SMALL | {"grid": (1, 3)}),
    "first chunk shorter": (6, chunked([1] + [3] * 13, noisy=1), SMALL),
    "guided": (3, guided(chunked([2] * 14, noisy=1)), SMALL | {"batch": 1}),
    "several chunks in flight": (4, rolling(2, 28, 3), SMALL),
    "no commit pass": (3, without_commits(chunked([3] * 14, noisy=1)), SMALL),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(4)
def test_every_decision_is_the_twins(case):
    frames, steps, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, layers=2, **world)
    kinds = ("kept", "read")
    found = compare_decisions(policy(frames), RecomputeScript(frames), tape, kinds)
    assert found.equal == found.total >= 200


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
def test_outputs_and_rows_are_the_twins(positions):
    """Frames stand side by side before the chunk, so both positions say the same."""
    steps, events = chunked([3] * 5 + [1], noisy=1), (Event("prompt_switch", 9, "another"),)
    tape = random_tape(steps, layers=1, grid=(1, 2), events=events)
    assert_same_as_twin(policy(4, positions=positions), RecomputeScript(4), tape)


def test_the_price_is_counted_and_rows_are_fresh():
    """Each chunk encodes as many frames as fit; rows depend on nothing that was dropped."""
    model = load_model("panorama")
    out = rollout(model, preset("recompute"), "dusk fast n10 left", 15, decode=False)
    assert out.costs[0].rebuilt_frames == 4 * 3 and out.rebuilds == 4
    (store, *_) = out.session.samples[0].stores["cond"]
    assert store.frames == (0, 13, 14)
    assert store.table.time.unique().tolist() == [12, 13, 14]
    wide = rollout(model, preset("recompute@12f"), "dusk fast n10 left", 15, decode=False)
    full = rollout(model, preset("full"), "dusk fast n10 left", 15, decode=False)
    assert torch.equal(wide.latents, full.latents) and wide.rebuilds == 4


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            {"part": "table", "amount": "4f", "shares": [[1, 1]]},
            "different amounts. Use a uniform budget",
        ),
        ("0f", "out of range"),
    ],
)
def test_settings_that_cannot_be(budget, text):
    with pytest.raises(ValueError, match=text):
        made = policy_from_dict({"name": "x", "retain": {"part": "recompute", "budget": budget}})
        made.check(random_tape(chunked([3] * 3)).geometry, 3, 9)


def test_a_budget_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="budget of 'recompute@1f'"):
        rollout(load_model("panorama"), preset("recompute@1f"), "dusk fast n10 left", 9)
