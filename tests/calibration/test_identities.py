"""Identities that all curves rest on, of a real pass in float64, against a plain softmax."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_passes import Masked, PartWay, site, whole

from lightning_kv.calibration.frames import attention_over, by_frame
from lightning_kv.calibration.passes import probe_products
from lightning_kv.calibration.scorers import SCORERS

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def plainly(view):
    """Softmax of all rows ``[H, T, rows]``, the unit of each row, and values."""
    keys = torch.cat([view.keys("read"), view.own_keys()], 1)
    values = torch.cat([view.values(), view.own_values()], 1)
    logits = view.query @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
    ids = view.frame_id[0].tolist()
    units = [view.frames.index(frame) for frame in ids]
    units += [len(view.frames)] * (logits.shape[-1] - len(ids))
    return logits, torch.tensor(units), values


@torch.no_grad()
@pytest.mark.parametrize("layer", range(3))
def test_composition_leave_one_out_and_gram(layer):
    """(1) of 2.3, (2) and (3): sets of frames, one frame less, and errors behind a projection."""
    call, looked, _ = site()
    view = looked.views[layer]
    lse, out = (torch.stack(own, 2) for own in zip(*by_frame(view), strict=True))  # [H, T, U]
    logits, units, values = plainly(view)
    dense = logits.softmax(-1) @ values
    share = lse.softmax(-1)
    weight = call.network.blocks[layer].self_attn.o.weight.T.unflatten(0, (2, -1))  # [H, D, dim]
    projected = torch.einsum("htud,hde->htue", out, weight)
    gram = projected @ projected.transpose(2, 3)
    rng = torch.Generator().manual_seed(layer)
    count = len(view.frames)
    sets = [torch.rand(2, count, generator=rng) < 0.5 for _ in range(3)]
    sets += [torch.arange(count) != gone for gone in range(count)]
    for kept in sets:
        kept = kept.expand(2, -1)
        every = torch.cat([kept, torch.ones(2, 1, dtype=torch.bool)], 1)
        mask = ~every[:, units].unsqueeze(1)
        masked = logits.masked_fill(mask, -torch.inf).softmax(-1) @ values
        new = lse.masked_fill(~every.unsqueeze(1), -torch.inf).softmax(-1)
        torch.testing.assert_close((new.unsqueeze(-1) * out).sum(2), masked, **EXACT)
        torch.testing.assert_close(attention_over(view, kept), masked.transpose(0, 1), **EXACT)
        moved = new - share
        errors = (moved.unsqueeze(2) @ gram @ moved.unsqueeze(3)).flatten(2).squeeze(2)
        expected = ((masked - dense) @ weight).square().sum(-1)
        torch.testing.assert_close(errors, expected, rtol=1e-9, atol=1e-14)
        if int(kept[0].sum()) == count - 1 and bool((kept[0] == kept[1]).all()):
            gone = int((~kept[0]).nonzero())
            p = share[:, :, gone].unsqueeze(-1)
            step = p / (1 - p) * (dense - out[:, :, gone])
            torch.testing.assert_close(masked - dense, step, rtol=1e-10, atol=1e-14)


def test_probes_of_every_coordinate_give_the_derivative_of_autograd():
    """The derivative of the estimate along a restriction, all of it, without a finite step."""
    call, looked, _ = site()
    kept = looked.kept(SCORERS["recency"], range(13))
    found = probe_products(looked, kept)  # [K, L, H, N], a probe for every number
    for layer, head, budget in ((0, 1, 0), (1, 0, 3), (2, 1, 7)):
        newest = sorted(looked.views[layer].frames)[len(looked.views[layer].frames) - budget :]
        alone = Masked(call.session, layer, head, newest)
        share = torch.zeros((), dtype=torch.float64, requires_grad=True)
        moved = whole(call, PartWay(call.session, alone, layer, share)).flatten()
        slope = [torch.autograd.grad(own, share, retain_graph=True)[0] for own in moved]
        mine = found[:, layer, head, budget]
        assert float(mine.abs().max()) > 1e-6
        torch.testing.assert_close(mine, torch.stack(slope), rtol=1e-9, atol=1e-14)


@torch.no_grad()
@pytest.mark.parametrize("layer", range(3))
def test_masses_are_those_of_this_pass(layer):
    """The site is a second step: what the first has written in flight is not in its softmax."""
    _, looked, _ = site()
    logits, units, _ = plainly(looked.views[layer])
    share = logits.softmax(-1).mean(1)  # [H, rows]
    expected = [share[:, units == unit].sum(-1) for unit in range(len(looked.views[layer].frames))]
    torch.testing.assert_close(looked.masses[layer], torch.stack(expected, -1), **EXACT)
