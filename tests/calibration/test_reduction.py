"""From records to curves: what the importances and moments of the file are."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_clips import SETTINGS, clip

from lightning_kv.calibration.reduction import reduced


def records(*names):
    """Means over the sites of clips a and b, by hand."""
    for key in "ab":
        own = clip(key).sites.values()
        yield [sum(record[name] for record in own) / len(own) for name in names]


def test_importances_are_losses_without_history_and_without_the_head():
    clips = [replace(clip(key), unit=key) for key in "ab"]
    made = reduced(clips, SETTINGS, 2).curves(["b"])
    history = sum(
        sum(site["gn/mass"].square().mean(0)[..., 0] / site["norm"] for site in own.sites.values())
        / len(own.sites)
        for own in clips
    )
    torch.testing.assert_close(made.importance["history"], history / 2)
    (_, (zero,)) = records("zero")
    torch.testing.assert_close(made.importance["zero"], zero)  # of those that validate


def test_variances_of_queries_are_those_of_all_queries():
    made = reduced([replace(clip(key), unit=key) for key in "ab"], SETTINGS, 2).curves([])
    (mean, square), (other, squares) = records("query/mean", "query/square")
    centre = (mean + other) / 2
    torch.testing.assert_close(made.extra["query/mean"], centre)
    torch.testing.assert_close(made.extra["query/var"], (square + squares) / 2 - centre**2)
