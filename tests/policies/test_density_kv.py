"""DensityKV against plain Python, pair by pair and row by row."""

import math

import pytest
import torch

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.density import DensityBank, Kernel, admitted, crowd
from lightning_kv.policies.registry import policy_from_dict, preset
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


def nearness(a, b, epsilon=1.0, power=2.0):
    """Of two keys, number by number."""
    square = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return (epsilon + square / (len(a) / 2)) ** -power


class DensityScript(Script):
    """The method once more; ``room`` of the bank in tokens, ``held`` where it starts late."""

    def __init__(self, room, sink=1, local=5, growth=2.0, held=None, epsilon=1.0, power=2.0):
        self.room, self.sink, self.local, self.growth = room, sink, local, growth
        self.held, self.kernel = held, (epsilon, power)
        self.end, self.begun, self.evicted, self.refused = {}, set(), 0, 0

    def fresh(self, row):
        return row.clone(columns={"density": 0.0, "baseline": 0.0})

    def key_at_zero(self, stream, row):
        return stream.turn(row.k, 0.0, row.place).tolist()

    def commit_all(self, streams, step):
        one = streams[0]
        where = one.namespace, one.sample
        recent = max(0, self.local - one.geometry.chunk)
        first, last = max(self.end.get(where, 0), self.sink), step.final[-1] + 1 - recent
        if self.held is not None and where not in self.begun and len(one.rows) <= self.held:
            return
        if first >= last:
            return
        self.begun.add(where)
        self.end[where] = last
        for layer in sorted({stream.layer for stream in streams}):
            self.layer([s for s in streams if s.layer == layer], first, last, len(step.final))

    def layer(self, streams, first, last, chunk):
        tokens = streams[0].geometry.tokens
        bank = [[r for r in s.rows if self.sink <= r.frame < first] for s in streams]
        new = [[r for r in s.rows if first <= r.frame < last] for s in streams]
        if not bank[0] and last - first > chunk:
            size = min(chunk * tokens, self.room)
            bank, new = [x[:size] for x in new], [x[size:] for x in new]
            for stream, rows in zip(streams, bank, strict=True):
                keys = [self.key_at_zero(stream, row) for row in rows]
                for i, row in enumerate(rows):
                    near = [nearness(keys[i], k, *self.kernel) for k in keys[:i] + keys[i + 1 :]]
                    self.note(row, sum(near), max(sum(near), 1e-6))
        every = [self.pairs(*own) for own in zip(streams, bank, new, strict=True)]
        count = self.count(bank, new, every)
        for stream, old, fresh, own in zip(streams, bank, new, every, strict=True):
            self.enter(stream, old, fresh, own, count)

    @staticmethod
    def note(row, density, baseline):
        row.time = 0.0
        row.columns["density"] = float(torch.tensor(density, dtype=torch.float32))
        row.columns["baseline"] = float(torch.tensor(baseline, dtype=torch.float32))

    def pairs(self, stream, bank, new):
        """Nearness of every newcomer to all, and the order in which newcomers stand."""
        keys = [self.key_at_zero(stream, row) for row in bank]
        mine = [self.key_at_zero(stream, row) for row in new]
        rho = [[nearness(a, b, *self.kernel) for b in keys] for a in mine]
        among = [[nearness(a, b, *self.kernel) for b in mine] for a in mine]
        old = [[nearness(a, b, *self.kernel) for b in keys] for a in keys]
        order = list(range(len(new)))
        if bank:
            worst = [
                max(x / row.columns["baseline"] for x, row in zip(own, bank, strict=True))
                for own in rho
            ]
            order.sort(key=lambda i: worst[i])
        return rho, among, old, order

    def count(self, bank, new, every):
        held, best = len(bank[0]), 0
        for n in range(1, min(len(new[0]), self.room) + 1):
            fine = True
            for rows, (rho, _, _, order) in zip(bank, every, strict=True):
                grown = self.grown(rows, rho, order[:n])
                over = sum(
                    x >= self.growth * r.columns["baseline"]
                    for x, r in zip(grown, rows, strict=True)
                )
                fine = fine and over <= max(0, held + n - self.room)
            if fine or not held:
                best = n
        self.refused += len(new[0]) - best
        return best

    def grown(self, rows, rho, chosen):
        return [
            row.columns["density"] + sum(rho[i][j] for i in chosen) for j, row in enumerate(rows)
        ]

    def enter(self, stream, bank, new, own, count):
        rho, among, old, order = own
        taken = order[:count]
        grown = self.grown(bank, rho, taken)
        surplus = max(0, len(bank) + count - self.room)

        def victim(j):
            over = grown[j] >= self.growth * bank[j].columns["baseline"]
            return -math.inf if over else -grown[j]

        gone = sorted(range(len(bank)), key=victim)[:surplus]
        self.evicted += len(gone)
        for j, row in enumerate(bank):
            density = max(0.0, grown[j] - sum(old[e][j] for e in gone))
            self.note(row, density, row.columns["baseline"])
        for i in taken:
            density = sum(rho[i][j] for j in range(len(bank)) if j not in gone)
            density += sum(among[i][o] for o in taken if o != i)
            self.note(new[i], density, max(density, 1e-6))
        out = {id(bank[j]) for j in gone} | {id(row) for i, row in enumerate(new) if i not in taken}
        stream.rows = [row for row in stream.rows if id(row) not in out]


def density(budget, **settings):
    own = {"part": "density-kv", "budget": budget, **settings}
    places = {"part": "clamp", "lag": 12, "to": "end"}
    return policy_from_dict({"name": "x", "retain": own, "positions": places})


# Steps, geometry, budget and settings, the script's: tokens of the bank, frames held or none.
PAPER = {"start": "paper"}
CASES = {
    "three frames": (
        chunked([3] * 14, noisy=1),
        {"grid": (1, 2), "batch": 2},
        ("9f", PAPER | {"growth": 3.0}),
        {"room": 12, "growth": 3.0},
    ),
    "pairs of a window without sink": (
        chunked([2] * 14, noisy=1, context=2),
        {"grid": (1, 3), "heads": 2},
        ("14t", {"sink": 0, "local": 3, "power": 1.0}),
        {"room": 11, "sink": 0, "local": 3, "held": 14, "power": 1.0},
    ),
    "fours, a short last chunk": (
        chunked([4] * 13 + [1], noisy=1),
        {"grid": (1, 2), "heads": 2},
        ("7f", {"sink": 2, "growth": 1.3}),
        {"room": 8, "sink": 2, "held": 14, "growth": 1.3},
    ),
    "single frames": (
        chunked([1] * 16, noisy=1),
        {"grid": (2, 2), "heads": 3},
        ("8f", PAPER | {"growth": 1.5}),
        {"room": 12, "growth": 1.5},
    ),
    "guided": (
        guided(chunked([3] * 14, noisy=1)),
        {"grid": (1, 2), "heads": 2},
        ("6f", {"epsilon": 0.5}),
        {"room": 6, "held": 12, "epsilon": 0.5},
    ),
    "several chunks in flight": (
        rolling(2, 28, 3),
        {"grid": (1, 2), "heads": 2},
        ("8f", PAPER | {"growth": 3.0}),
        {"room": 8, "growth": 3.0},
    ),
    "a prompt switch": (
        chunked([3] * 14, noisy=1),
        {"grid": (1, 3), "heads": 2, "events": (Event("prompt_switch", 21, "b"),)},
        ("8f", {}),
        {"room": 15, "held": 24},
    ),
    "no commit pass": (
        without_commits(chunked([2] * 14)),
        {"grid": (1, 2), "heads": 4},
        ("9f", PAPER | {"growth": 4.0}),
        {"room": 10, "growth": 4.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(8)
def test_every_decision_is_the_twins(case):
    """Over 14 chunks, the bank full and beyond; in float64, but densities as they are stored."""
    steps, world, (budget, settings), own = CASES[case]
    script = DensityScript(**own)
    tape = random_tape(steps, dtype=torch.float64, **world)
    equal, total = compare_decisions(density(budget, **settings), script, tape, ("kept", "read"))
    assert equal == total >= 200
    assert script.evicted + script.refused > 20


@pytest.mark.parametrize("case", ["three frames", "pairs of a window without sink"])
@pytest.mark.thinned(2)
def test_outputs_and_rows_are_the_twins(case):
    steps, world, (budget, settings), own = CASES[case]

    class Placed(DensityScript):
        def time(self, stream, step, row):
            return step.start - min(step.start - row.time, 12 - len(step.frames))

    steps = [step for step in steps if step.chunk < 7]
    tape = random_tape(steps, **world | {"batch": 1, "heads": 2}, dtype=torch.float64)
    assert_same_as_twin(density(budget, **settings), Placed(**own), tape)


@pytest.mark.parametrize("seed", range(4))
def test_the_density_is_that_of_a_double_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    keys, new = (torch.randn(3, n, 6, generator=rng, dtype=torch.float64) for n in (7, 5))
    near = Kernel(1.0 + seed / 4, 2.0 - seed / 4)
    first = crowd(keys, near)
    bank = DensityBank(keys, first, first.clamp_min(1e-6))
    take, stay, old, fresh = admitted(bank, new, 8, 1.3, near)
    assert len({*take.sum(1).tolist()}) == 1
    for h in range(3):
        there = [(keys[h, j], old[h, j]) for j in range(7) if stay[h, j]]
        there += [(new[h, i], fresh[h, i]) for i in range(5) if take[h, i]]
        assert len(there) <= 8
        for i, (a, found) in enumerate(there):
            total = 0.0
            for j, (b, _) in enumerate(there):
                if i != j:
                    total += nearness(a.tolist(), b.tolist(), near.epsilon, near.power)
            assert float(found) == pytest.approx(total, abs=1e-12)


def test_the_worked_example():
    """Chunks of 3: what is held of which frames, and how far back it is read."""
    tape = random_tape(chunked([3] * 6, noisy=1), layers=1, heads=1, grid=(1, 2))
    rows, lags, read = {}, {}, {}
    made = density("9f", start="paper")

    def look(view):
        read[view.step.chunk] = view.frames
        rows[view.step.chunk] = view.rows_per_frame[0].tolist()
        lags[view.step.chunk] = view.lag[0, 0].tolist()

    tape.play(made, watch=look)
    assert read[0] == () and read[1] == (0, 1, 2) and read[2] == tuple(range(6))
    assert rows[2] == [2] * 6 and lags[2] == [6] * 8 + [2, 2, 1, 1]
    assert read[3][:4] == (0, 1, 2, 3) and rows[3][:4] == [2] * 4 and read[3][-2:] == (7, 8)
    assert lags[3][:8] == [9] * 8 and lags[5][:-4] == [9] * (len(lags[5]) - 4)
    assert preset("density-kv").retain.budget.amount == "9f"


def test_many_frames_in_flight_leave_the_window_its_order():
    """A reach of 12 of 21 frames ends with the oldest chunk in flight, not with the youngest."""
    world = {"layers": 1, "heads": 1, "grid": (1, 1), "train_horizon": 21}
    tape, lags = random_tape(rolling(3, 39, 5), **world), []

    def look(view):
        if view.query_frames > 12 and view.frames[-2:-1]:
            lags.append(view.lag[0, 0].tolist())

    tape.play(preset("density-kv@9f"), watch=look)
    assert lags and all(own[-2:] == [2, 1] for own in lags)


@pytest.mark.parametrize("wrong", [{"sink": -1}, {"epsilon": 0}, {"growth": -1}, {"start": "now"}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"out of range|unknown"):
        density("9f", **wrong)
