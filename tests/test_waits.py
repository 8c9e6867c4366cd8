"""How often the host waits for the device: once at a commit, never in a pass with a plan in force.

Counted on the CPU, by operations that would wait on a GPU. The full size (30 layers, 12 heads) is
shown by `python tools/count_waits.py`.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import count_waits

from lightning_kv.policies.registry import presets

LAYERS, CHUNK = 3, 4  # four chunks of three frames came before: more than any policy here reads
CASES = count_waits.cases(LAYERS)


def preset_of(case):
    return case.name.partition("@")[0].partition(",")[0]


def test_every_policy_is_counted():
    named = {preset_of(case) for case in CASES if case.sampler != "guided"}
    assert set(presets(any_model=True)) <= named
    guided = {preset_of(case) for case in CASES if case.name.endswith(", guided")}
    assert {"full", "sliding-window", "h2o", "top-attention", "oracle"} <= guided


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.thinned(17)
def test_waits(case):
    """At most one at a commit, two where rows get codecs; one per layer and sample where how much
    is read, or kept in a pass before it attends, depends on scores; none in any other pass."""
    row = count_waits.counted(case, LAYERS, CHUNK)
    assert row.denoising > 0 or case.sampler == "rolling"
    most = (2 if case.codes else 1) + case.closing
    assert row.commit <= most + case.planned * row.replanned
    assert row.first <= case.planned + case.opening
    assert row.denoise <= case.planned * row.replanned * row.denoising
