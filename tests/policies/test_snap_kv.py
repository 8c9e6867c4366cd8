"""SnapKV against its slow twin, and where the answer is known beforehand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow_units import RAGGED, SnapScript

from lightning_kv.policies.registry import load_policy
from lightning_kv.testing import (
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    held_rows,
    random_tape,
    rolling,
    without_commits,
)


def snap(budget, **settings):
    """A policy with the part."""
    return load_policy({"name": "x", "retain": {"part": "snap-kv", "budget": budget, **settings}})


# Steps, grid, heads, batch, budget and the frames that it allows, settings. 14 chunks each.
TWOS, SHORT = chunked([2] * 14, noisy=0), chunked([2] * 13 + [1], noisy=0)
ONES, FOURS = chunked([1] * 14, noisy=0), chunked([4] * 13 + [3], noisy=0)
TOKEN = {"granularity": "token"}
CASES = {
    "frames": (TWOS, (1, 3), 4, 2, "3f", 3, {}),
    "one by one, a sink": (ONES, (1, 5), 4, 2, "4f", 4, {"sink": 2}),
    "short last, ragged": (SHORT, (1, 3), 4, 2, *RAGGED, {"sink": 1}),
    "four, sampled": (FOURS, (1, 2), 4, 2, "5f", 5, {"queries": 5, "pool": 1}),
    "tokens": (ONES, (3, 3), 4, 2, "15t", 15 / 9, TOKEN),
    "tokens, ragged, a sink": (SHORT, (2, 2), 4, 2, *RAGGED, TOKEN | {"sink": 1, "queries": 3}),
    "tokens, wide pool": (ONES, (2, 4), 4, 2, "17t", 17 / 8, TOKEN | {"pool": 5, "queries": 4}),
    "tokens, guided": (guided(ONES), (2, 3), 4, 1, "15t", 2.5, TOKEN),
}


def held(policy, tape):
    """Frame, row and column of what each head of the first layer holds in the end."""
    session = tape.session(policy)
    tape.play(session)
    table = session.samples[0].stores["cond"][0].table
    each = [held_rows(table, head) for head in range(tape.geometry.heads)]
    return [[(row.frame, *row.place) for row in rows] for rows in each]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_every_decision_is_that_of_the_slow_twin(case):
    """In float64, so that no rounding decides between two rows."""
    steps, grid, heads, batch, budget, frames, settings = CASES[case]
    script = SnapScript(frames, **settings)
    own = {"heads": heads, "grid": grid, "batch": batch, "dtype": torch.float64}
    tape = random_tape(steps, **own, gain=3.0, seed=len(case))
    equal, total = compare_decisions(snap(budget, **settings), script, tape)
    assert equal == total >= 200
    assert min(script.evictions.values()) > 2


@pytest.mark.parametrize("granularity", ["frame", "token"])
def test_outputs_and_rows_are_those_of_the_twin(granularity):
    script = SnapScript(4, granularity, 1)
    tape = random_tape(chunked([2] * 6, noisy=1), heads=2, grid=(2, 2))
    assert_same_as_twin(snap("4f", granularity=granularity, sink=1), script, tape)


def test_only_the_frames_that_become_final_are_asked():
    """Where the pass that makes them final has noisy frames in it too, those do not count."""
    script = SnapScript(4)
    steps = without_commits(rolling(2, 20, 2))
    tape = random_tape(steps, grid=(1, 3), dtype=torch.float64)
    assert compare_decisions(snap("4f"), script, tape).equal == 10 * 6


def test_alike_mass_is_alike_everywhere():
    """Queries of length 0 look at all rows alike: no row is worse for lying at a border.

    64 rows share the mass, so the scores are equal to the last digit; of equals the earlier stay.
    """
    tape = random_tape(chunked([2] * 4, noisy=0), heads=2, grid=(2, 4), gain=0.0)
    for rows in held(snap("57t", granularity="token"), tape):
        first = [(row // 8, row % 8 // 4, row % 4) for row in range(41)]
        newest = [(6 + row // 8, row % 8 // 4, row % 4) for row in range(16)]
        assert rows == first + newest


def test_neighbours_of_what_is_looked_at_stay():
    """One row takes all attention: with a pool of 3, those around it are as good; with 1, none."""
    tape = random_tape(chunked([1] * 3, noisy=0), layers=1, heads=1, grid=(3, 5), gain=0.0)
    loud = [torch.zeros_like(entry.layers[0][1]) for entry in tape.entries]
    loud[1][:, 6] = 30.0  # row 1, column 1 of the second frame
    entries = [
        replace(entry, layers=((torch.ones_like(k), k, k),))
        for entry, k in zip(tape.entries, loud, strict=True)
    ]
    tape = replace(tape, entries=tuple(entries))
    (rows,) = held(snap("24t", granularity="token"), tape)
    assert [row for row in rows if row[0] == 1] == [(1, r, c) for r in range(3) for c in range(3)]


def test_nothing_is_remembered():
    """What the newest chunk looks at decides; the part holds nothing once memory is full."""
    tape = random_tape(chunked([2] * 6, noisy=0))
    session = tape.session(snap("4f"))
    tape.play(session)
    assert session.samples[0].states["cond"]["retain"]["mass"] == {}


@pytest.mark.parametrize("wrong", [{"pool": 2}, {"pool": -1}, {"queries": 0}])
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=r"must be|Use one of"):
        snap("4f", **wrong)
