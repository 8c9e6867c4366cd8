"""What is written down of a pass: the sink in every curve, and probes that are each site's own."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_clips import meter

import lightning_kv.calibration.sites as sites
from lightning_kv.calibration.sites import losses
from lightning_kv.policies.registry import policy_from_dict

SINK = {"name": "x", "retain": {"part": "window", "sink": 3, "budget": "6f"}}


@pytest.fixture(scope="module")
def sunk():
    """Records of a clip whose heads all keep the first three of six frames; of all queries."""
    own = meter(sink=3, exact=(3, 4, 6), rows=1000)
    own = replace(own, reference=policy_from_dict(SINK))
    return own.of_prompt("a", "a", "x", validates=True).sites.values()


def test_curves_start_from_the_sink_and_end_where_nothing_is_lost(sunk):
    """By the mass on each frame: three frames in the middle, the newest first, then the sink."""
    for record in sunk:
        newest = record["lag/mass"][..., :3]
        lost = record["mass/recency"]
        torch.testing.assert_close(lost[..., 0], newest.sum(-1), rtol=1e-6, atol=1e-9)
        for kept in range(4):
            rest = newest[..., kept:].sum(-1)
            torch.testing.assert_close(lost[..., kept], rest, rtol=1e-6, atol=1e-9)
            best = newest.sort(-1, descending=True).values[..., kept:].sum(-1)
            torch.testing.assert_close(record["mass/mass"][..., kept], best, rtol=1e-6, atol=1e-9)
        for metric in ("mass", "output", "gn", "exact"):
            own = [losses(record, metric, scorer) for scorer in ("mass", "recency")]
            torch.testing.assert_close(own[0][..., 0], own[1][..., 0])  # only the sink is kept
            assert max(float(each[..., -1].abs().max()) for each in own) < 1e-12
            assert min(float(each[..., 0].min()) for each in own) > 0


def test_with_the_sink_alone_probes_and_masks_agree(sunk):
    """To the noise of three probes and eight places, of heads that matter most."""
    gn, exact = (
        sum(losses(record, metric, "mass")[..., 0] for record in sunk) for metric in ("gn", "exact")
    )
    assert float((gn.sum() / exact.sum()).log().abs()) < 0.7


def test_probes_are_signs_and_no_two_sites_share_them(monkeypatch):
    """Else the noise of probes would not fall with the number of sites and prompts."""
    real, seen = sites.look, []

    def noted(call, probes):
        seen.append(torch.stack(list(probes)))
        return real(call, probes)

    monkeypatch.setattr(sites, "look", noted)
    own = meter()
    for key in ("a", "b", "a"):
        own.of_prompt(key, key, "x")
    assert all(bool((probes.abs() == 1).all()) for probes in seen)
    first, other, again = (torch.cat(seen[start : start + 4]).flatten(1) for start in (0, 4, 8))
    assert torch.equal(first, again)
    every = torch.cat([first, other])
    assert len(every.unique(dim=0)) == len(every) == 2 * 4 * 3
