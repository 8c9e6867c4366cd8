"""Rolling Sink against plain Python, and the order in which archived frames come back."""

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import load_policy
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
)


class RollingSinkScript(Script):
    """The archive as an endless list: forwards, backwards, forwards, ..."""

    def __init__(self, budget, sink=0):
        self.budget, self.sink, self.played = budget, sink, 0
        once = [*range(budget), *reversed(range(budget))]
        self.order = once * 20

    def commit(self, stream, step):
        new = [row for row in stream.rows if row.frame in step.final]
        before, start = list(stream.archive), step.final[0]
        stream.archive += [row.clone() for row in new if row.frame < self.budget]
        genuine = [r for r in stream.rows if self.budget <= r.frame < start]
        stream.rows = [row for row in stream.rows if row not in genuine]
        for frame in sorted({row.frame for row in genuine}):
            come = [row for row in before if row.frame == self.order[frame]]
            stream.rows += [row.clone(time=float(frame)) for row in come]
            self.played += 1
        end = step.final[-1] + 1
        oldest = end - (self.budget - self.sink)
        stream.rows = [r for r in stream.rows if r.time >= oldest or r.time < self.sink]


def policy(budget, **settings):
    return load_policy(
        {"name": "x", "retain": {"part": "rolling-sink", "budget": f"{budget}f", **settings}}
    )


WORLD = {"heads": 2, "batch": 2, "grid": (1, 2)}
SWITCH = (Event("prompt_switch", 12, "another"), Event("scene_cut", 20))
CASES = {
    "threes": (6, {}, chunked([3] * 14, noisy=1), WORLD | {"layers": 1}),
    "single frames, a sink": (4, {"sink": 1}, chunked([1] * 14, noisy=1), WORLD | {"grid": (3, 2)}),
    "fours, of no multiple, short last": (9, {}, chunked([4] * 13 + [1], noisy=1), WORLD),
    "other first chunk, events": (
        6, {}, chunked([1] + [3] * 13, noisy=1), WORLD | {"events": SWITCH},
    ),
    "guided, given chunks": (
        5, {"sink": 2}, guided(chunked([2] * 14, noisy=1, context=2)), WORLD | {"batch": 1},
    ),
    "several chunks in flight": (6, {}, rolling(2, 28, 2), WORLD | {"batch": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(6)
def test_every_decision_is_the_twins(case):
    budget, settings, steps, world = CASES[case]
    script = RollingSinkScript(budget, **settings)
    tape = random_tape(steps, dtype=torch.float64, **world)
    found = compare_decisions(policy(budget, **settings), script, tape, ("kept", "read"))
    assert found.equal == found.total >= 200
    assert script.played > 2 * budget


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_rows_are_the_twins(case):
    """The archive too, and the time of every copy."""
    budget, settings, steps, world = CASES[case]
    tape = random_tape(steps, **world | {"batch": 1, "layers": 1})
    assert_same_as_twin(policy(budget, **settings), RollingSinkScript(budget, **settings), tape)


def test_the_order_of_a_window_of_21():
    """Chunk by chunk what the third newest chunk becomes, by hand from the paper's rule."""
    tape = random_tape(chunked([3] * 20, noisy=0), layers=1, heads=1, grid=(1, 1))
    session, seen = tape.session(preset("rolling-sink")), {}
    for step, _ in tape.running(session):
        table = session.samples[0].stores["cond"][0].table
        pairs = sorted(zip(table.time[0].tolist(), table.frame_id[0].tolist(), strict=True))
        seen[step.start] = pairs
    assert [f for _, f in seen[18]] == list(range(3, 21))
    for start, come in {
        21: (17, 16, 15), 24: (14, 13, 12), 36: (2, 1, 0), 39: (0, 1, 2), 54: (15, 16, 17),
        57: (17, 16, 15),
    }.items():  # fmt: skip
        pairs = seen[start]
        assert [time for time, _ in pairs] == list(range(start + 3 - 18, start + 3))
        assert tuple(f for time, f in pairs if start - 3 <= time < start) == come
        assert [f for time, f in pairs if time >= start] == [start, start + 1, start + 2]
    shelf = session.samples[0].stores["cond"][0].shelf
    assert shelf.frames == tuple(range(18))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="sink"):
        policy(9, sink=-1)
    own = load_policy({"name": "x", "retain": {"part": "rolling-sink", "budget": "0.5"}})
    with pytest.raises(ValueError, match="archive is filled once"):
        own.check(random_tape().geometry, 3, 24)
