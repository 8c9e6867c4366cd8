"""Lists: what fits together, what is refused, and that padding changes nothing."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from random_lists import random_lists

from lightning_kv.distillation.lists import Lists, column_moments, concatenated
from lightning_kv.distillation.losses import output_error


def same(one, other):
    return all(torch.equal(getattr(one, x.name), getattr(other, x.name)) for x in fields(Lists))


def without_outputs(lists):
    return replace(lists, share=None, gram=None, query=None)


def test_parts_put_together_are_the_whole():
    lists, _ = random_lists()
    parts = [lists.select(slice(0, 7)), lists.select(torch.arange(7, 40))]
    assert same(concatenated(parts), lists) and [len(part) for part in parts] == [7, 33]
    mask = lists.candidate.sum(-1) > 2
    assert same(lists.select(mask), lists.select(mask.nonzero().flatten()))
    bare = without_outputs(lists)
    assert concatenated([bare.select(mask), bare.select(~mask)]).gram is None


def test_shorter_lists_are_padded_and_cost_the_same():
    short, attention = random_lists(places=4, seed=1)
    long, other = random_lists(places=7, seed=2)
    both = concatenated([short, long])
    assert both.places == 7 and both.candidate.sum() == short.candidate.sum() + long.candidate.sum()
    kept = both.candidate & (torch.rand(80, 7, generator=torch.Generator().manual_seed(3)) < 0.5)
    expected = torch.cat([attention.error(kept[:40, :4]), other.error(kept[40:])])
    torch.testing.assert_close(output_error(both, kept), expected, rtol=1e-3, atol=1e-6)


def test_lists_go_to_a_device_whole():
    lists, _ = random_lists(count=2)
    moved = lists.to("meta")
    assert {getattr(moved, x.name).device.type for x in fields(Lists)} == {"meta"}
    assert without_outputs(lists).to("meta").share is None


def test_what_does_not_fit_together_is_refused():
    lists, _ = random_lists(count=4)
    for name, value, said in (
        ("target", lists.target[:, 1:], r"target as torch.float32 \(4, 6\).*\(4, 7\)"),
        ("head", lists.head.int(), r"head as torch.int32 \(4,\).*torch.int64 \(4,\)"),
        ("context", lists.context[0], r"context as torch.float32 \(2,\).*\(4, 'C'\)"),
        ("share", lists.share[..., 1:], r"share as .*\(4, 3, 7\).*\(4, 3, 8\)"),
        ("query", lists.query[:, 1:], r"query as .*\(4, 2\).*\(4, 3\)"),
        ("candidate", lists.candidate.float(), "candidate as torch.float32"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(lists, **{name: value})
    with pytest.raises(ValueError, match=r"share and query alone. Give share, gram and query"):
        replace(lists, gram=None)
    with pytest.raises(ValueError, match="0 were given"):
        concatenated([])
    with pytest.raises(ValueError, match="5 features of a frame, 2 of a list and 3 queries, others "
                       "5 features of a frame, 2 of a list and 0 queries"):  # fmt: skip
        concatenated([lists, without_outputs(lists)])
    with pytest.raises(ValueError, match="of 7 places cannot be padded to 3"):
        lists.padded(3)


def test_moments_of_columns_are_those_of_candidates():
    lists, _ = random_lists()
    rubbish = lists.features.masked_fill(~lists.candidate.unsqueeze(-1), torch.nan)
    rubbish[..., 1] = 100 + 1e-5 * lists.features[..., 1]  # the same, but for its last digit
    mean, deviation, mean_of_lists, deviation_of_lists = column_moments(
        replace(lists, features=rubbish)
    )
    rows = torch.stack([lists.features[n, u] for n, u in lists.candidate.nonzero().tolist()])
    rows[:, 1] = 100
    torch.testing.assert_close(mean, rows.mean(0))
    expected = rows.std(0, correction=0)
    torch.testing.assert_close(deviation, expected.where(torch.arange(5) != 1, 0.0))
    assert deviation[1] == 0  # and not what rounding left
    torch.testing.assert_close(mean_of_lists, lists.context.mean(0))
    torch.testing.assert_close(deviation_of_lists, lists.context.std(0, correction=0))
    with pytest.raises(ValueError, match="40 lists without a single candidate"):
        column_moments(replace(lists, candidate=torch.zeros_like(lists.candidate)))
