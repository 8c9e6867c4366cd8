"""R-KV against its slow twin, and where the answer is known beforehand."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow_units import RAGGED, UnitScript, around, by_frame, near

from lightning_kv.policies.registry import load_policy
from lightning_kv.policies.retain.r_kv import redundancy
from lightning_kv.testing import (
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    held_rows,
    random_tape,
)


def charged(likeness, beside, alike):
    """Redundancy of units in their order: the softmax of what each is charged for on average.

    Args:
        likeness: A function of two units.
        beside: The units that each one is compared with, itself included.
        alike: Above this two units are like each other.
    """
    charge = dict.fromkeys(beside, 0.0)
    for unit, others in beside.items():
        found = {other: likeness(unit, other) for other in others if other != unit}
        newest = max([unit, *(other for other, x in found.items() if x > alike)])
        for other, x in found.items():
            charge[other] += 0.0 if other == newest else x / len(beside[other])
    total = sum(math.exp(x) for x in charge.values())
    return {unit: math.exp(x) / total for unit, x in charge.items()}


class RedundantScript(UnitScript):
    """Pooled attention against redundancy."""

    def __init__(self, frames, granularity="frame", sink=0, window=520, **own):
        super().__init__(frames, granularity, sink, window)
        self.weight, self.pool = own.get("weight", 0.1), own.get("pool", 3)
        self.reach, self.alike = own.get("reach", 2), own.get("alike", 0.5)

    def values(self, stream, names, mass):
        grid = stream.geometry.grid
        key = {(row.frame, row.place): row.k / row.k.norm() for row in stream.rows}
        look = {n: max(mass[o] for o in near(n, names, grid, self.pool // 2)) for n in names}
        if self.granularity == "token":
            beside = {n: around(n, names, grid, self.reach) for n in names}
            again = charged(lambda a, b: float(key[a] @ key[b]), beside, self.alike)
        else:
            look, tokens = by_frame(look), range(stream.geometry.tokens)
            frames = {frame: sorted(look) for frame in sorted(look)}
            again = charged(
                lambda a, b: sum(float(key[a, p] @ key[b, p]) for p in tokens) / len(tokens),
                frames,
                self.alike,
            )
        return {unit: self.weight * look[unit] - (1 - self.weight) * again[unit] for unit in look}


def redundant(budget, **settings):
    """A policy with the part."""
    return load_policy({"name": "x", "retain": {"part": "r-kv", "budget": budget, **settings}})


# Steps, grid, heads, batch, budget and the frames that it allows, settings. 14 chunks each. Random
# keys are hardly alike, so the bar is low in most.
TWOS, SHORT = chunked([2] * 14, noisy=0), chunked([2] * 13 + [1], noisy=0)
ONES, FOURS = chunked([1] * 14, noisy=0), chunked([4] * 13 + [3], noisy=0)
LOW, TOKEN = {"alike": 0.05}, {"granularity": "token", "alike": 0.3}
CASES = {
    "frames": (TWOS, (1, 3), 4, 2, "3f", 3, LOW),
    "one by one, a sink": (ONES, (1, 4), 4, 2, "5f", 5, {"sink": 2, "alike": 0.0}),
    "short last, ragged": (SHORT, (1, 2), 4, 2, *RAGGED, LOW | {"sink": 1, "weight": 0.5}),
    "four, sampled": (FOURS, (1, 2), 4, 2, "5f", 5, {"window": 3}),
    "tokens": (ONES, (2, 3), 4, 2, "16t", 16 / 6, TOKEN),
    "tokens, ragged, a sink": (SHORT, (2, 2), 4, 2, *RAGGED, TOKEN | {"sink": 1, "window": 3}),
    "tokens, small reach": (ONES, (3, 3), 4, 2, "15t", 15 / 9, TOKEN | {"reach": 1, "pool": 1}),
    "tokens, guided": (guided(ONES), (1, 5), 4, 1, "13t", 2.6, TOKEN | {"reach": 0, "weight": 0}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_every_decision_is_that_of_the_slow_twin(case):
    """In float64, so that no rounding decides between two rows."""
    steps, grid, heads, batch, budget, frames, settings = CASES[case]
    script = RedundantScript(frames, **settings)
    own = {"heads": heads, "grid": grid, "batch": batch, "dtype": torch.float64}
    tape = random_tape(steps, **own, gain=3.0, seed=len(case))
    equal, total = compare_decisions(redundant(budget, **settings), script, tape)
    assert equal == total >= 200
    assert min(script.evictions.values()) > 2


@pytest.mark.parametrize("granularity", ["frame", "token"])
def test_outputs_and_rows_are_those_of_the_twin(granularity):
    script = RedundantScript(4, granularity, 1)
    tape = random_tape(chunked([2] * 6, noisy=1), heads=2, grid=(2, 2))
    assert_same_as_twin(redundant("4f", granularity=granularity, sink=1), script, tape)


# -- what is redundant -----------------------------------------------------------------------


def one_hot(*frames):
    """Keys ``[1, F, 1, 8]`` that are equal where the numbers are, and at right angles otherwise."""
    return torch.eye(8)[list(frames)].view(1, -1, 1, 8)


@pytest.mark.parametrize(
    ("keys", "charges"),
    [
        ((0, 1, 2, 3), (0, 0, 0, 0)),
        ((0, 1, 2, 1), (0, 1, 0, 0)),
        ((0, 1, 1, 1), (0, 2, 2, 0)),
        ((2, 1, 2, 1), (1, 1, 0, 0)),
    ],
)
def test_the_newest_of_like_keys_is_spared(keys, charges):
    there = torch.ones(1, len(keys), 1, dtype=torch.bool)
    found = redundancy(one_hot(*keys), there, (1, 1), 0, 0.5)
    torch.testing.assert_close(found.flatten(), (torch.tensor(charges) / 4).softmax(0))


def test_keys_below_the_bar_are_charged_both_ways():
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).view(1, 2, 1, 2)
    there = torch.ones(1, 2, 1, dtype=torch.bool)
    both = redundancy(x, there, (1, 1), 0, 0.7).flatten()
    torch.testing.assert_close(both, torch.full((2,), 0.5))
    older = redundancy(x, there, (1, 1), 0, 0.5).flatten()
    torch.testing.assert_close(older, torch.tensor([0.3, 0.0]).softmax(0))


@pytest.mark.parametrize(("reach", "meets"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_rows_are_compared_within_reach(reach, meets):
    """A key that comes again two columns away, where all others are at right angles."""
    x = torch.eye(8).view(1, 2, 4, 8).clone()
    x[0, 1, 3] = x[0, 0, 1]
    there = torch.ones(1, 2, 4, dtype=torch.bool)
    charge = torch.zeros(2, 4)
    charge[0, 1] = meets / (2 * min(4, 2 + reach))  # rows that it is compared with, itself too
    found = redundancy(x, there, (1, 4), reach, 0.5)
    torch.testing.assert_close(found, charge.flatten().softmax(0).view(1, 2, 4))


def with_keys(tape, keys):
    """The tape with other keys ``[F, D]``, one for each frame, at all its places."""
    entries = []
    for entry in tape.entries:
        own = keys[list(entry.step.frames)].repeat_interleave(tape.geometry.tokens, 0)
        layers = [
            (q, own.view(1, -1, 1, keys.shape[1]).expand_as(k), v) for q, k, v in entry.layers
        ]
        entries.append(replace(entry, layers=tuple(layers)))
    return replace(tape, entries=tuple(entries))


def held(policy, tape):
    """Frame and place of what each head of the first layer holds in the end."""
    session = tape.session(policy)
    tape.play(session)
    table = session.samples[0].stores["cond"][0].table
    each = [held_rows(table, head) for head in range(tape.geometry.heads)]
    return [[(row.frame, *row.place) for row in rows] for rows in each]


def test_of_two_like_frames_the_older_goes():
    tape = random_tape(chunked([1] * 7, noisy=0), heads=2)
    tape = with_keys(tape, torch.eye(12)[[0, 1, 2, 3, 1, 4, 5]])
    for rows in held(redundant("6f", weight=0.0), tape):
        assert sorted({frame for frame, _, _ in rows}) == [0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("granularity", ["frame", "token"])
def test_where_keys_stand_does_not_matter(granularity):
    """Without attention, keys that are read at other times are as redundant as before."""
    tape = random_tape(chunked([2] * 6, noisy=0), dtype=torch.float64)
    made = redundant("4f", weight=0.0, granularity=granularity)
    moved = replace(made, positions=load_policy({"name": "y", "positions": "contiguous"}).positions)
    assert held(made, tape) == held(moved, tape)


def test_with_attention_alone_it_is_a_pooled_mass():
    """λ = 1 and no pooling: SnapKV without pooling."""
    tape = random_tape(chunked([2] * 6, noisy=0))
    snap = {"part": "snap-kv", "budget": "4f", "pool": 1}
    mine = held(redundant("4f", weight=1.0, pool=1), tape)
    assert mine == held(load_policy({"name": "y", "retain": snap}), tape)


@pytest.mark.parametrize(
    "wrong", [{"pool": 2}, {"window": 0}, {"weight": 1.5}, {"alike": -1}, {"reach": -1}]
)
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=r"must be|Use one of"):
        redundant("4f", **wrong)
