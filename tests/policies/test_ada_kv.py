"""Ada-KV: SnapKV's scores, shared among the heads of a layer, against a slow twin."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow_units import SnapScript, mean_mass

from lightning_kv import preset
from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.testing import (
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
)


class AdaScript(SnapScript):
    """A safe share of each head's own best, then the best of all heads of the layer."""

    def __init__(self, frames, *settings, safe=0.2, **more):
        super().__init__(frames, *settings, **more)
        self.safe, self.kept, self.lengths = safe, {}, set()

    def gathered(self, streams, step):
        for layer in {stream.layer for stream in streams}:
            self.divide([s for s in streams if s.layer == layer], step)

    def divide(self, streams, step):
        tokens, frames = streams[0].geometry.tokens, self.granularity == "frame"
        room, size = round(self.frames * tokens), tokens if frames else 1
        every, kept = [], {}
        for stream in streams:
            names = [(row.frame, row.place) for row in stream.rows]
            value = self.values(stream, names, mean_mass(stream, step, self.queries))
            of = {unit: unit if frames else unit[0] for unit in value}
            safe = {u for u in value if of[u] < self.sink or of[u] >= step.final[0]}
            best = sorted(value, key=lambda u: (u not in safe, -value[u] if u not in safe else 0))
            own = {*safe, *best[: round(self.safe * room) // size]}
            kept[stream.head] = own
            every += [(-value[u], stream.head, i, u) for i, u in enumerate(value) if u not in own]
        left = (room * len(streams) - size * sum(map(len, kept.values()))) // size
        for _, head, _, unit in sorted(every)[:left]:
            kept[head].add(unit)
        for stream in streams:
            self.kept[id(stream)] = kept[stream.head]

    def commit(self, stream, step):
        kept, frames = self.kept[id(stream)], self.granularity == "frame"
        rows = [r for r in stream.rows if (r.frame if frames else (r.frame, r.place)) in kept]
        stream.rows = rows
        self.lengths.add(len(rows))


def policy(amount, safe=0.2, **settings):
    own = {"part": "adaptive", "amount": amount, "safe": safe}
    return policy_from_dict({"name": "x", "retain": {"part": "snap-kv", "budget": own, **settings}})


SWITCH = (Event("prompt_switch", 12, "another"),)
CASES = {
    "pairs": ("4f", 4, {}, chunked([2] * 14, noisy=0), {"batch": 2, "grid": (1, 2)}),
    "short last, a switch": (
        "6f", 6, {"sink": 1}, chunked([3] * 13 + [1], noisy=0),
        {"batch": 2, "grid": (1, 2), "events": SWITCH},
    ),
    "rows one by one": (
        "19t", 19 / 6, {"granularity": "token", "queries": 4}, chunked([1] * 14, noisy=0),
        {"batch": 2, "grid": (2, 3)},
    ),
    "nothing is safe": ("6f", 6, {"safe": 0.0}, chunked([4] * 14, noisy=0), {"grid": (1, 1)}),
    "guided": ("3f", 3, {"safe": 0.7}, guided(chunked([1] * 14, noisy=0)), {"grid": (1, 3)}),
    "several in flight": ("4f", 4, {}, rolling(2, 28, 2), {"batch": 2, "grid": (1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_every_decision_is_that_of_the_slow_twin(case):
    amount, frames, settings, steps, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, gain=3.0, seed=len(case), heads=4, **world)
    script = AdaScript(frames, **settings)
    found = compare_decisions(policy(amount, **settings), script, tape)
    assert found.equal == found.total >= 100
    assert len(script.lengths) > 2, "heads should keep different numbers"


def test_outputs_and_rows_are_those_of_the_twin():
    tape = random_tape(chunked([2] * 6, noisy=1), heads=3, grid=(2, 2))
    assert_same_as_twin(policy("4f"), AdaScript(4), tape)


def test_the_published_setting():
    budget = preset("ada-kv").retain.budget
    assert (budget.name, budget.amount, budget.safe, budget.over) == (
        "adaptive",
        "9f",
        0.2,
        "layer",
    )
