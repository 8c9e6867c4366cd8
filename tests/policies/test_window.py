"""Windows, their prompt switches and their places in time, against plain Python."""

import pytest
import torch

from lightning_kv import preset
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
)


class WindowScript(Script):
    """A sink and the newest frames; what a switch does; frames side by side in time."""

    def __init__(self, frames, chunk, sink=0, switch="keep", cut=None):
        self.frames, self.chunk, self.sink, self.switch = frames, chunk, sink, switch
        self.cut, self.scene = cut, None

    def commit(self, stream, step):
        frames = sorted({row.frame for row in stream.rows})
        first = [f for f in frames if f < self.sink]
        rest = [f for f in frames if f >= self.sink]
        kept = first + rest[len(rest) - min(len(rest), self.frames - len(first)) :]
        stream.rows = [row for row in stream.rows if row.frame in kept]

    def event(self, event, streams, step):
        if event.kind == "scene_cut":
            self.scene = event.frame
        if event.kind != "prompt_switch" or self.switch == "keep":
            return None
        made = step.start
        if self.switch == "flush":
            for stream in streams:
                last = max((row.frame for row in stream.rows), default=0)
                stream.rows = [r for r in stream.rows if r.frame < self.sink or r.frame == last]
            return None
        first = [f for f in range(made) if f < self.sink]
        rest = [f for f in range(made) if f >= self.sink]
        hold = rest[len(rest) - min(len(rest), self.frames - len(first)) :]
        if not hold:
            return None
        both = self.switch == "recache"
        window = self.frames + self.chunk
        again = rest[max(0, len(rest) - (window - len(first))) :] if both else list(range(made))
        again = again if both else again[max(0, made - window) :]
        return Rebuild(tuple(again), hold=tuple(hold), spare=tuple(first), together=both, read=both)

    def time(self, stream, step, row):
        if self.cut is None:
            return row.time
        frames = sorted({r.frame for r in stream.rows})
        place, size = frames.index(row.frame), len(frames)
        if self.cut and step.start == self.scene and self.cut > size:
            size = self.cut
        return step.query_times[0] - size + place


def policy(frames, sink=0, switch="keep", cut=None):
    part = {"part": "window", "budget": f"{frames}f", "sink": sink, "switch": switch}
    moved = "absolute" if cut is None else {"part": "contiguous", "cut": cut}
    return policy_from_dict({"name": "x", "retain": part, "positions": moved})


SWITCH = (Event("prompt_switch", 6, "a"), Event("scene_cut", 12), Event("prompt_switch", 24, "b"))
LATE = (Event("prompt_switch", 52, "a"),)
SMALL = {"heads": 2, "batch": 2, "grid": (1, 2), "events": SWITCH}
CASES = {
    "longlive": (chunked([3] * 14, noisy=1), SMALL, (9, 3, "recache")),
    "longlive, single frames": (chunked([1] * 26, noisy=1), SMALL, (4, 2, "recache")),
    "longlive, pairs": (chunked([2] * 14, 1, 2), SMALL | {"grid": (1, 3)}, (5, 0, "recache")),
    "longlive, short last": (chunked([4] * 13 + [2], 1), SMALL | {"events": LATE},
                             (6, 1, "recache")),
    "longlive, chunk by chunk": (chunked([3] * 14, noisy=1), SMALL, (8, 2, "recache-causal")),
    "longlive, guided": (guided(chunked([3] * 14, noisy=1)), SMALL, (6, 3, "recache")),
    "longlive, in flight": (rolling(2, 28, 3), SMALL, (6, 2, "recache")),
    "infinity-rope": (chunked([3] * 14, noisy=1), SMALL, (3, 1, "flush", 45)),
    "infinity-rope, single": (chunked([1] * 26, 1), SMALL | {"grid": (2, 2)}, (5, 1, "flush", 9)),
    "infinity-rope, in flight": (rolling(3, 29, 2), SMALL, (4, 1, "flush", 20)),
    "a cut that is near": (chunked([2] * 14, noisy=1), SMALL, (8, 1, "keep", 4)),
}  # fmt: skip


def script(steps, settings):
    return WindowScript(settings[0], max(len(step.final) for step in steps), *settings[1:])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(4)
def test_every_decision_is_the_twins(case):
    steps, world, settings = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, layers=2, **world)
    made = policy(*settings)
    found = compare_decisions(made, script(steps, settings), tape, ("kept", "read"))
    assert found.equal == found.total >= 200


@pytest.mark.parametrize("case", [*list(CASES)[-4:-3], *list(CASES)[-2:]])
@pytest.mark.thinned(3)
def test_outputs_and_rows_are_the_twins(case):
    steps, world, settings = CASES[case]
    tape = random_tape(steps, layers=1, **world | {"batch": 1})
    assert_same_as_twin(policy(*settings), script(steps, settings), tape)


def test_infinity_rope_stands_far_away_after_a_scene_cut():
    """The chunk stands at 45; of three held frames the oldest is 45 before it, the newest 43."""
    tape, lags = random_tape(chunked([3] * 4, 1), layers=1, events=(Event("scene_cut", 6),)), {}

    def watch(view):
        lags.setdefault(view.step.start, view.lag.unique().tolist())

    tape.play(preset("infinity-rope"), watch=watch)
    assert lags == {0: [], 3: [1, 2, 3], 6: [43, 44, 45], 9: [1, 2, 3]}


def test_a_cut_must_not_be_negative():
    with pytest.raises(ValueError, match="cut=-1"):
        policy(3, cut=-1)
