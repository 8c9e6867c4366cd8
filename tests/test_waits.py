"""How often the host waits for the device: once at a commit, never in a pass with a plan in force.

Counted on the CPU, by operations that would wait on a GPU. The full size (30 layers, 12 heads) is
shown by `python tools/count_waits.py`.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import count_waits

LAYERS = 3


@pytest.fixture(scope="module")
def found():
    return {row.name: row for row in count_waits.rows(LAYERS)}


def test_every_policy_is_counted(found):
    from lightning_kv.policies.registry import presets

    named = {name.partition("@")[0].partition(",")[0] for name in found}
    assert set(presets()) <= named


@pytest.mark.parametrize("case", count_waits.cases(LAYERS), ids=lambda case: case.name)
def test_waits(found, case):
    """At most one at a commit, two where rows get codecs; one per layer and sample where how much
    is read depends on scores; none in any other pass."""
    row = found[case.name]
    assert row.commit <= (2 if case.codes else 1) + case.planned * row.replanned
    assert row.first <= case.planned
    assert row.denoise <= case.planned * row.replanned * row.denoising
