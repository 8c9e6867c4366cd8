"""The stand-in for PaFu-KV against its slow twin, and where the answer is known beforehand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow_units import RAGGED, UnitScript, by_frame, shares

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.testing import (
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
    without_commits,
)


class SalientScript(UnitScript):
    """The largest, over the queries, of the mean share over the heads that have a row."""

    def gathered(self, streams, step):
        self.salience = {}
        for layer in {stream.layer for stream in streams}:
            each = [shares(s, step, self.queries) for s in streams if s.layer == layer]
            for name in {name for own in each for name in own}:
                held = [own[name] for own in each if name in own]
                means = [sum(x) / len(held) for x in zip(*held, strict=True)]
                self.salience[layer, name] = max(means)

    def mass(self, stream, step):
        return {name: x for (layer, name), x in self.salience.items() if layer == stream.layer}

    def values(self, stream, names, mass):
        rows = {name: mass[name] for name in names}
        return by_frame(rows) if self.granularity == "frame" else rows


def policy(budget, **settings):
    retain = {"part": "pa-fu-kv", "budget": budget, **settings}
    return policy_from_dict({"name": "x", "retain": retain})


SWITCH = (Event("prompt_switch", 12, "another"),)
TWOS, ONES = chunked([2] * 14, noisy=0), chunked([1] * 14, noisy=0)
SHORT, FOURS = chunked([3] * 13 + [1], noisy=0), chunked([4] * 14, noisy=0)
CASES = {
    "pairs": (TWOS, "3f", 3, {}, {"batch": 2, "grid": (1, 3)}),
    "short last, a switch, a sink": (
        SHORT, "5f", 5, {"sink": 1}, {"batch": 2, "grid": (1, 2), "events": SWITCH},
    ),
    "rows one by one": (
        ONES, "15t", 2.5, {"granularity": "token", "queries": 4}, {"batch": 2, "grid": (2, 3)},
    ),
    "heads hold others": (TWOS, *RAGGED, {"queries": 3}, {"batch": 2, "grid": (1, 3)}),
    "rows, heads hold others": (
        ONES, *RAGGED, {"granularity": "token", "sink": 1}, {"batch": 2, "grid": (2, 2)},
    ),
    "fours": (FOURS, "6f", 6, {}, {"batch": 2, "grid": (2, 1)}),
    "guided": (guided(ONES), "4f", 4, {}, {"grid": (1, 3)}),
    "several in flight": (rolling(2, 28, 2), "4f", 4, {}, {"batch": 2, "grid": (1, 2)}),
    "no commit pass": (
        without_commits(rolling(2, 28, 2)), "4f", 4, {}, {"batch": 2, "grid": (1, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(4)
def test_every_decision_is_that_of_the_slow_twin(case):
    steps, budget, frames, settings, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, gain=3.0, seed=len(case), heads=4, **world)
    script = SalientScript(frames, **settings)
    found = compare_decisions(policy(budget, **settings), script, tape)
    assert found.equal == found.total >= 200
    assert min(script.evictions.values()) > 2


def test_outputs_and_rows_are_those_of_the_twin():
    tape = random_tape(chunked([2] * 6, noisy=1), heads=2, grid=(2, 2))
    assert_same_as_twin(policy("4f", sink=1), SalientScript(4, sink=1), tape)


def test_one_query_is_enough():
    """A row that one query takes for all stays before rows that every query looks at a little."""
    tape = random_tape(chunked([1] * 3, noisy=0), layers=1, heads=1, grid=(1, 4), gain=0.0)
    entries = []
    for i, entry in enumerate(tape.entries):
        q, k, v = (torch.zeros_like(x) for x in entry.layers[0])
        k[..., 2], k[..., 4] = float(i == 1), float(i == 0)  # what each past frame is like
        q[..., 4] = 2.0
        q[:, 3, :, 2], q[:, 3, :, 4] = 60.0, 0.0
        entries.append(replace(entry, layers=((q, k, v),)))
    session = (tape := replace(tape, entries=tuple(entries))).session(policy("2f"))
    tape.play(session)
    assert session.samples[0].stores["cond"][0].frames == (1, 2)


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="queries=0"):
        policy("4f", queries=0)
