"""How much memory is alive at the worst moment: what is held and one layer's work buffer.

In 30 layers of 12 heads, with frames of 24 tokens; `python tools/peak_memory.py` shows more
policies, and other sizes.
"""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import peak_memory

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import Rotary

MIB = 2**20
# chunks of 3 frames: a window of 9 is full after 3 of them; focused reading holds every frame
CHUNKS = {
    "sliding-window@9f": 5,
    "infinity-rope@9f": 5,
    "focused-forcing@6f": 10,
    "int4 window@9f": 5,
}


@cache
def measured(name, buffers):
    grid = peak_memory.bench.GRIDS[24]
    geometry = Geometry(30, 12, 64, grid, Rotary(64), 21, chunk=3, flight=3)
    with torch.no_grad():
        spec = peak_memory.POLICIES[name]
        return peak_memory.measure(name, spec, geometry, buffers, CHUNKS[name])


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.thinned(3)
def test_the_peak_is_what_is_held_and_a_work_buffer(name):
    one = measured(name, "remake")
    assert 0 < one.work < one.held < one.peak
    assert one.ratio <= 1.05


@pytest.mark.parametrize("name", ["sliding-window@9f", "infinity-rope@9f"])
@pytest.mark.thinned(2)
def test_buffers_that_are_kept_hold_at_least_as_much(name):
    kept, remade = measured(name, "keep"), measured(name, "remake")
    assert kept.held >= remade.held
    assert kept.ratio <= 1.05


def test_rotated_copies_are_kept_and_count():
    """Keys of all layers at the positions they are read at."""
    kept, remade = (measured("infinity-rope@9f", buffers) for buffers in ("keep", "remake"))
    assert kept.held > 1.2 * remade.held


def test_scoring_a_layer_at_480p_takes_little_room():
    """All logits at once, 520 queries of 12 heads with 21 frames of 1560 keys, would be 818 MB."""
    assert 0 < peak_memory.scoring() < 200e6


# -- how it is followed ----------------------------------------------------------------------


class Noted:
    def __init__(self, name, size):
        self.made, self.size = name, size

    def name(self):
        return self.made

    def nbytes(self):
        return self.size


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([], 0),
        ([5], 5),
        ([5, 7, -5, 4, -7, -4], 12),
        ([5, -5, 7, -7, 6], 7),
        ([3, 4, -3, 9, -4, 1], 13),
        ([-8, 5], 0),  # what was alive before is released: nothing was added to it
    ],
)
def test_the_most_bytes_alive(sizes, most):
    events = [Noted("[memory]", size) for size in sizes]
    assert peak_memory.living(events) == most


def test_other_events_are_passed_over():
    events = [Noted("[memory]", 5), Noted("aten::empty", 100), Noted("[memory]", 2)]
    assert peak_memory.living(events) == 7


def test_allocations_of_torch_are_followed_in_their_order():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(4 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(2 * MIB, dtype=torch.uint8)
        del second, third
        last = torch.empty(5 * MIB, dtype=torch.uint8)
    assert peak_memory.living(watched.profiler.kineto_results.events()) == 7 * MIB
    assert len(last) == 5 * MIB
