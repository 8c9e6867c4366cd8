"""PyramidKV: how much every layer gets, and against a slow twin."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from slow_units import SnapScript

from lightning_kv import preset
from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import Rotary
from lightning_kv.policies.budget.pyramid import pyramid
from lightning_kv.policies.registry import build_part, policy_from_dict
from lightning_kv.testing import (
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
)


def line(layers, amount, least, beta):
    """Each layer's share before it is rounded, as the paper writes it down."""
    low = (amount - least) / beta
    high = 2 * (amount - least) - low
    if layers == 1:
        return [amount]
    return [least + high - layer * (high - low) / (layers - 1) for layer in range(layers)]


def test_thirty_layers_of_nine_frames():
    """Beside the newest chunk there are 6 frames on average: from 11.7 to 0.3."""
    found = pyramid(30, 9, 3, 20.0)
    assert (found[0], found[-1], sum(found)) == (15, 3, 270)
    assert [round(x, 3) for x in line(30, 9, 3, 20)][::29] == [14.7, 3.3]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 30), st.integers(0, 40), st.floats(1, 50, allow_nan=False)
)
def test_the_mean_is_the_amount_and_lower_layers_get_more(layers, least, more, beta):
    amount = least + more
    found, exact = pyramid(layers, amount, least, beta), line(layers, amount, least, beta)
    assert sum(found) == layers * amount
    assert list(found) == sorted(found, reverse=True)
    assert min(found) >= least
    assert all(abs(n - x) < 1 + 1e-6 for n, x in zip(found, exact, strict=True))


def policy(amount, granularity="frame", sink=0, queries=520, **budget):
    own = {"part": "pyramid", "amount": amount, **budget}
    retain = {"part": "snap-kv", "budget": own, "granularity": granularity, "sink": sink}
    return policy_from_dict({"name": "x", "retain": {**retain, "queries": queries}})


# Budget, frames of each layer, settings, steps, and the world. 14 chunks and more.
TWOS, SHORT = chunked([2] * 14, noisy=0), chunked([3] * 13 + [1], noisy=0)
SWITCH = (Event("prompt_switch", 12, "another"),)
CASES = {
    "pairs": ("5f", (8, 5, 2), {}, TWOS, {"layers": 3, "heads": 2, "batch": 2, "grid": (1, 2)}),
    "short last, a switch": (
        "6f", (9, 3), {}, SHORT, {"heads": 4, "batch": 2, "grid": (1, 2), "events": SWITCH},
    ),
    "one by one, a flat pyramid": (
        "4f", (6, 4, 2), {"beta": 3.0, "sink": 1, "least": "1f"}, chunked([1] * 14, noisy=0),
        {"layers": 3, "heads": 3, "batch": 2, "grid": (2, 2)},
    ),
    "rows": (
        "13t", (20 / 6, 1), {"granularity": "token", "least": "6t", "queries": 4},
        chunked([1] * 14, noisy=0), {"heads": 4, "batch": 2, "grid": (2, 3)},
    ),
    "guided": (
        "9f", (14, 4), {}, guided(chunked([4] * 14, noisy=0)), {"heads": 4, "grid": (1, 1)},
    ),
    "several in flight": (
        "4f", (6, 2), {}, rolling(2, 28, 2), {"heads": 4, "batch": 2, "grid": (1, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_every_decision_is_that_of_the_slow_twin(case):
    amount, frames, settings_, steps, world = CASES[case]
    each = [[own] * world["heads"] for own in frames]
    own = {k: v for k, v in settings_.items() if k in ("granularity", "sink", "queries")}
    tape = random_tape(steps, dtype=torch.float64, gain=3.0, seed=len(case), **world)
    found = compare_decisions(policy(amount, **settings_), SnapScript(each, **own), tape)
    assert found.equal == found.total >= 100


def test_outputs_and_rows_are_those_of_the_twin():
    tape = random_tape(chunked([2] * 6, noisy=1), heads=2, grid=(2, 2))
    assert_same_as_twin(policy("4f"), SnapScript([[6, 6], [2, 2]]), tape)


@pytest.mark.parametrize(
    ("amount", "settings_", "sink", "fits"),
    [
        ("9f", {}, 0, "4f"),
        ("9f", {}, 2, None),
        ("9f", {"least": "5f"}, 2, "9f"),
        ("40t", {"least": "20t"}, 2, "20t"),
        ("36t", {}, 2, None),
        ("4f", {}, 2, "no"),
    ],
)
def test_no_layer_gets_less_than_what_is_protected(amount, settings_, sink, fits):
    made = policy(amount, sink=sink, **settings_)
    geometry = Geometry(4, 3, 12, (2, 2), Rotary(12), 21, chunk=3)
    if fits is None:
        unit = "5f" if amount.endswith("f") else "20t"
        with pytest.raises(ValueError, match=f"5 are protected in every layer. Give least: {unit}"):
            made.check(geometry, 3, 40)
    elif fits == "no":
        with pytest.raises(ValueError, match="must lie between 5f and"):
            made.check(geometry, 3, 40)
    else:
        made.check(geometry, 3, 40)


def test_a_small_share_is_the_same_for_all():
    """A share of a short history may be less than the newest chunk: nothing is left to divide."""
    tape = random_tape(chunked([3] * 6, noisy=0))
    session = tape.session(preset("pyramid-kv@0.3"))
    frames = []
    for step, _ in tape.running(session):
        if step.final:
            stores = session.samples[0].stores["cond"]
            frames.append([store.memory.lengths[0] // 6 for store in stores])
    assert frames == [[3, 3]] * 4 + [[5, 3], [7, 3]]


@pytest.mark.parametrize("wrong", [{"beta": 0.5}, {"least": "10f"}, {"least": "3t"}])
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=r"beta=0.5|does not work\. Give both as frames"):
        build_part("budget", {"part": "pyramid", "amount": "9f", **wrong})
