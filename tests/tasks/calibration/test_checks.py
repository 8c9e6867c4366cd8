"""Cheap against exact losses, the gate, the looks of the stopping rule, and what is said."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lightning_kv.calibration.reduction import Reduced
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.stats.stopping import look
from lightning_kv.tasks.calibration.checks import advice, agreement, looks, plain, sentences_of
from lightning_kv.tasks.calibration.conclude import check_enough

SETTINGS = SiteSettings(reach=6, scorers=("mass",), exact=(0, 2, 6))
LAYERS, HEADS = 3, 4


def drawn(prompts=8, noise=0.1, spread=1.0, settings=SETTINGS, seed=0):
    """Curves that fall by one third with each frame, and exact losses with noise on top."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    size = (spread * normal(LAYERS, HEADS)).exp().unsqueeze(-1)
    falls = (2 / 3) ** torch.arange(7).double()
    falls[-1] = 0
    summaries = []
    for _ in range(prompts):
        gn = size * falls * (0.2 * normal(LAYERS, HEADS, 1)).exp()
        exact = gn[..., list(settings.exact)] * (noise * normal(LAYERS, HEADS, 1)).exp()
        found = {"mass/gn": gn, "mass/output": gn * 2, "mass/mass": gn.sqrt(), "exact/mass": exact}
        found |= {"zero": normal(LAYERS, HEADS).exp(), "floor": torch.tensor(0.25).double()}
        found |= {"lag/mass": gn, "query/mean": size, "query/square": size.square() + 1}
        summaries.append(found | {"gram/gn": torch.eye(LAYERS * HEADS).double()})
    keys = tuple(f"prompt-{n}" for n in range(prompts))
    return Reduced(keys, tuple(summaries), settings)


def test_agreement_is_that_of_scipy_on_the_prompts_that_validate():
    own = drawn()
    keys = own.prompts[2:7]
    found = agreement(own, keys, 2)
    assert found["validated"] == sorted(keys) and found["floor"] == 0.25
    gn, exact = (own.stacked(name, keys).mean(0) for name in ("mass/gn", "exact/mass"))
    expected = spearmanr(gn[..., 0].flatten(), exact[..., 0].flatten()).statistic
    middle, low, high = found["spearman_gn_exact"]
    assert middle == pytest.approx(expected) and low <= middle <= high
    assert set(found["budgets"]) == {"mass@0f", "mass@2f"}  # at the reach nothing is lost
    at = found["budgets"]["mass@2f"]
    assert set(at) == {"gn", "output", "mass"}
    ratio = (gn[..., 2] / exact[..., 1]).log().abs().flatten().numpy()
    assert at["gn"]["median_abs_log_ratio"] == pytest.approx(np.median(ratio))
    assert 0 < at["gn"]["reliability"] <= 1 and at["gn"]["disattenuated"] is not None
    assert found["nearest"] == {"frames": 2, "spearman": at["gn"]["spearman"]}
    assert "With 2 frames left" in sentences_of(found)[0]
    zero = own.stacked("zero", keys).mean(0).flatten()
    expected = spearmanr(zero, exact[..., 0].flatten()).statistic
    assert found["spearman_zero_history"][0] == pytest.approx(expected)


def test_behind_a_sink_the_same_budgets_are_compared():
    """The curves of a grid that starts at two frames."""
    own = drawn()
    cut = [
        {
            name: value[..., 2:] if name.startswith("mass/") else value
            for name, value in each.items()
        }
        | {"exact/mass": each["exact/mass"][..., 1:]}
        for each in own.summaries
    ]
    sunk = Reduced(own.prompts, tuple(cut), replace(SETTINGS, sink=2, exact=(2, 6)))
    found, plain = agreement(sunk, own.prompts, 2), agreement(own, own.prompts, 2)
    assert found["budgets"] == {"mass@2f": plain["budgets"]["mass@2f"]}
    assert found["gate_at"] == 2
    assert found["spearman_gn_exact"] == plain["budgets"]["mass@2f"]["gn"]["spearman"]


@pytest.mark.parametrize(
    ("noise", "gate", "words"),
    [
        (0.0, "probes", "probes will do"),
        (0.9, "screen", "tell roughly"),
        (9, "exact", "do not rank"),
    ],
)
def test_the_gate_is_the_lower_bound(noise, gate, words):
    found = agreement(own := drawn(noise=noise, spread=1.2), own.prompts, 2)
    low = found["spearman_gn_exact"][1]
    assert (low >= 0.9, 0.7 <= low < 0.9, low < 0.7) == tuple(
        gate == name for name in ("probes", "screen", "exact")
    )
    assert found["gate"] == gate and words in " ".join(sentences_of(found))


def test_few_prompts_have_no_gate():
    own = drawn()
    found = agreement(own, own.prompts[:2], 2)
    assert found["gate"] is None and found["spearman_gn_exact"][0] is not None
    assert "Validate on 3 prompts or more" in " ".join(sentences_of(found))
    found = agreement(own, [], 2)
    assert found["gate"] is None and "validate 0" in sentences_of(found)[0]
    none = replace(own, settings=replace(SETTINGS, exact=()))
    assert (
        agreement(none, own.prompts, 2)["why"] == "no budget below the reach was measured exactly"
    )
    assert "not compared" in sentences_of(agreement(none, own.prompts, 2))[0]


def test_looks_are_those_of_the_prompts_that_came_first():
    own = drawn(prompts=18)
    curves = own.curves([])
    order = list(range(18))[::-1]
    found = looks(curves, order, "mass", "gn", 2)
    assert [each.prompts for each in found] == [8, 16, 18]
    every = curves.prompts("mass", "gn")[order].flatten(1, 2).numpy()

    def solve(some):
        """By greedy steps: exact for curves that are convex."""
        mean = some.mean(0)
        places = np.zeros(LAYERS * HEADS, dtype=int)
        for _ in range(2 * LAYERS * HEADS):
            gain = [m[p] - m[p + 1] if p < 6 else -1 for m, p in zip(mean, places, strict=True)]
            places[int(np.argmax(gain))] += 1
        return places

    even = np.full(LAYERS * HEADS, 2)
    plainly = look(every[:8], solve, even)
    assert found[0].change == pytest.approx(plainly.change, abs=0.1)  # but for shrinkage
    assert found[0].verdict == plainly.verdict == "table"
    assert advice(found[0], 2)[-1] == "That is enough: no more prompts are needed."
    assert plain(found[0])["verdict"] == "table"


def test_it_says_how_many_more_and_when_to_give_up():
    curves = drawn(prompts=4, spread=0.0).curves([])
    last = looks(curves, range(4), "mass", "gn", 2)[-1]
    assert last.verdict == "more prompts"
    assert advice(last, 2)[-1] == "Measure 4 prompts more: --prompts 8."
    curves = drawn(prompts=64, spread=0.0).curves([])
    last = looks(curves, range(64), "mass", "gn", 2)[-1]
    assert last.verdict == "uniform" and last.stop
    assert len(advice(last, 2)) == 1 and "use uniform" in advice(last, 2)[0]


def test_one_prompt_is_not_enough():
    check_enough(2, "are asked for")
    with pytest.raises(ValueError, match=r"Too few prompts: 1 were measured.* Give 2 or more; 8"):
        check_enough(1, "were measured")
