"""Relax Forcing against its slow twin, and the spec's worked example."""

import math

import pytest
import torch

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import load_policy, presets
from lightning_kv.policies.select.relax_forcing import candidates
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


def unit(vectors):
    """Their mean, with length 1."""
    mean = sum(vectors) / len(vectors)
    return mean / math.sqrt(float(mean @ mean))


def spread(middle, count, least):
    """Offsets of the candidates, by equally spaced numbers."""
    half = middle // 2
    count = min(count, middle - half)
    if count <= 1:
        found = [half] * count
    else:
        step = (middle - 1 - half) / count
        found = sorted({math.floor(half + i * step + 1e-9) for i in range(count + 1)})[:-1]
    newest = [i for i in reversed(range(middle)) if i not in found]
    while len(found) < least:
        found.append(newest.pop(0))
    return sorted(found)


class RelaxScript(Script):
    """Decides for the chunk to come when the one before it is final, from keys of layer 0."""

    def __init__(self, budget=4, sink=2, tail=1, count=4, weight=2.0, frames=120):
        self.history, self.sink, self.tail = budget - sink - tail, sink, tail
        self.count, self.weight, self.frames = count, weight, frames
        self.read, self.seen, self.scored = {}, {}, 0

    def commit(self, stream, step):
        """Room for the next chunk."""
        coming = step.next_chunk or stream.geometry.chunk
        held = sorted({row.frame for row in stream.rows})
        while len(held) > self.frames - coming:
            held.remove(next(f for f in held if f >= self.sink))
        stream.rows = [row for row in stream.rows if row.frame in held]

    def commit_all(self, streams, step):
        """One answer for all streams of a sample."""
        where = (streams[0].namespace, streams[0].sample)
        keys = {}
        for stream in streams:
            for row in stream.rows if stream.layer == 0 else []:
                keys.setdefault(row.frame, []).append(row.k.double())
        held = sorted(keys)
        if len(held) <= self.sink + self.history + self.tail:
            self.read[where] = set(held)
            return
        first, last = held[: self.sink], held[len(held) - self.tail :]
        between = held[self.sink : len(held) - self.tail]
        offered = [
            between[i] for i in spread(len(between), self.count * self.history, self.history)
        ]
        self.seen[step.final[-1] + 1] = offered
        likes = {}
        for frame in offered:
            mine = unit(keys[frame])
            one, other = (
                float(mine @ unit([k for f in own for k in keys[f]])) if own else 0.0
                for own in (first, last)
            )
            likes[frame] = one - self.weight * other
        best = sorted(offered, key=lambda f: (-likes[f], f))[: self.history]
        self.scored += len(offered) > self.history
        self.read[where] = {*first, *best, *last}

    def reads(self, stream, step, frame, index, row, current):
        """The same for all layers, heads and query frames."""
        return current or row.frame in self.read[stream.namespace, stream.sample]

    def time(self, stream, step, row):
        """Side by side before the chunk."""
        read = sorted(self.read[stream.namespace, stream.sample], reverse=True)
        return step.start - 1 - read.index(row.frame) if row.frame in read else row.time


def relax(budget="4f", frames=120, sink=2, **settings):
    """The preset with other settings."""
    return load_policy(
        {
            "name": "x",
            "retain": {"part": "reservoir", "frames": frames, "sink": sink},
            "select": {"part": "relax-forcing", "budget": budget, "sink": sink, **settings},
            "positions": {"part": "contiguous", "of": "read"},
        }
    )


@pytest.mark.parametrize("chunks", [8, pytest.param(44, marks=pytest.mark.slow)])
def test_the_worked_example(chunks):
    """Candidates of chunks of 3, with the release's reservoir of 120 frames."""
    script = RelaxScript()
    tape = random_tape(
        chunked((3,) * chunks, 0), layers=1, heads=1, grid=(1, 2), dtype=torch.float64
    )
    found = compare_decisions(load_policy("relax-forcing"), script, tape)
    assert found.equal == found.total == chunks * (1 + 3)  # what is kept, and what 3 frames read
    assert script.seen[6] == [3] and script.seen[9] == [5, 6] and script.seen[12] == [6, 7, 8, 9]
    assert script.seen[15] == [8, 9, 10, 11] and script.seen[18] == [9, 10, 12, 14]
    assert script.seen[21] == [11, 13, 15, 17]
    for c0 in range(120, 3 * chunks, 3):
        assert script.seen[c0] == [c0 - 58, c0 - 44, c0 - 30, c0 - 16]


@pytest.mark.parametrize("middle", range(1, 130))
def test_candidates_are_equally_spaced(middle):
    """As integer parts of equally spaced numbers, for one frame of history and for more."""
    for history in range(min(middle, 7)):
        assert candidates(middle, 4 * history, history) == spread(middle, 4 * history, history)


SWITCH = (Event("prompt_switch", 20, "another prompt"),)
ONES, TWOS = chunked((1,) * 16, 1), chunked((2,) * 14, 1)
CASES = {
    "chunks of 1, two samples": (ONES, (1, 3), 2, {}),
    "the paper's, chunks of 3": (chunked((3,) * 14, 1), (2, 3), 1, {}),
    "more history, a short last": (chunked((3,) * 13 + (1,), 1), (3, 2), 1, {"budget": "9f"}),
    "a small reservoir, a switch": (TWOS, (1, 3), 2, {"frames": 14, "budget": "5f"}),
    "chunks of 4, tail 3": (chunked((4,) * 14, 1), (1, 2), 1, {"tail": 3, "budget": "7f"}),
    "no sink": (TWOS, (1, 3), 1, {"sink": 0, "tail_weight": 0.5, "budget": "3f"}),
    "no tail": (TWOS, (1, 3), 1, {"tail": 0, "candidates": 2}),
    "no history": (TWOS, (1, 3), 1, {"budget": "3f"}),
    "first chunk shorter": (chunked((1,) + (3,) * 10, 1), (2, 2), 1, {}),
    "rolling": (rolling(2, 24, 3), (1, 3), 1, {"budget": "6f"}),
    "no commit pass": (without_commits(TWOS), (1, 3), 2, {}),
    "guided": (guided(chunked((3,) * 9, 1)), (1, 3), 1, {}),
}


def script_of(settings):
    """The twin of :func:`relax`."""
    names = {"candidates": "count", "tail_weight": "weight"}
    own = {names.get(name, name): value for name, value in settings.items()}
    return RelaxScript(**own | {"budget": int(settings.get("budget", "4f")[:-1])})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(12)
def test_every_decision_is_that_of_the_slow_twin(case):
    steps, grid, batch, settings = CASES[case]
    sizes = {"grid": grid, "batch": batch, "heads": 2, "seed": len(case)}
    tape = random_tape(steps, **sizes, events=SWITCH, dtype=torch.float64)
    script = script_of(settings)
    equal, total = compare_decisions(relax(**settings), script, tape)
    assert equal == total >= 200
    assert script.scored > 3 or case == "no history"


@pytest.mark.parametrize("case", ["the paper's, chunks of 3", "rolling"])
@pytest.mark.slow
def test_outputs_and_rows_are_those_of_the_twin(case):
    """Positions too: what is read stands side by side."""
    steps, grid, batch, settings = CASES[case]
    tape = random_tape(steps, heads=2, grid=grid, batch=batch)
    assert_same_as_twin(relax(**settings), script_of(settings), tape)


def test_a_few_outputs_are_those_of_the_twin():
    tape = random_tape(chunked((1,) * 8, 1), heads=2, grid=(1, 2))
    assert_same_as_twin(relax(), RelaxScript(), tape)


def test_the_preset_reads_four_frames_and_keeps_120():
    made = load_policy("relax-forcing")
    assert made.select.budget.amount == "4f" and made.retain.frames == 120
    assert load_policy("relax-forcing@9f").select.budget.amount == "9f"
    assert presets()["relax-forcing"].saves == ("reads",)


def test_settings_that_cannot_work():
    for wrong in ({"candidates": 0}, {"tail": -1}, {"tail_weight": -1.0}, {"frames": 2}):
        with pytest.raises(ValueError, match=r"must be"):
            relax(**wrong)
    table = {"part": "table", "amount": "4f", "shares": [[1, 1, 1]] * 2}
    with pytest.raises(ValueError, match=r"'table' gives heads different amounts"):
        relax(table).check(random_tape().geometry, 3, 24)
    with pytest.raises(ValueError, match=r"between 3f"):
        relax("2f").check(random_tape().geometry, 3, 24)
