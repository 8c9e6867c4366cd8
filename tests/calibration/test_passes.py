"""Losses of heads: identities, probes against derivatives, shared prefixes against whole passes."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_network import TINY, encoder

from lightning_kv.calibration.frames import kept_by_score, kept_means, kept_shares
from lightning_kv.calibration.passes import (
    exact_losses,
    look,
    masses_and_errors,
    probe_products,
)
from lightning_kv.calibration.scorers import SCORERS
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout


@cache
def site():
    """What the network is given in the second step of the fifth chunk: twelve frames of history."""
    torch.manual_seed(0)
    network = CausalWan(TINY).double().eval()
    with torch.no_grad():
        for name, own in network.named_parameters():
            if "modulation" in name or name.endswith("self_attn.o.weight"):
                own.mul_(3)  # heads that matter
    found = []

    def note(call):
        if (call.step.chunk, call.step.step, call.step.phase) == (4, 1, "denoise"):
            found.append(call)
            found.append(look(call, basis(call.x), remember=True))
            found.append(look(call, basis(call.x)[:3]))
            raise StopIteration  # so that the memory stays as this pass meets it

    with pytest.raises(StopIteration):
        rollout(
            VideoModel(network, None, encoder), preset("full"), "a", 18, decode=False, before=note
        )
    return found


def basis(x):
    """A probe for every number of the estimate."""
    return list(torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape))


class Masked:
    """Attention as a plain softmax with a mask of rows, one head of one layer restricted."""

    def __init__(self, session, layer, head, keep):
        self.session, self.asked, self.keep = session, (layer, head), keep

    def attend(self, layer, q, k, v, step):
        view = self.session.view(layer, q, k, v, step)
        keys = torch.cat([view.keys("read"), view.own_keys()], 1)
        values = torch.cat([view.values(), view.own_values()], 1)
        logits = view.query @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        if layer == self.asked[0]:
            gone = ~torch.isin(view.frame_id[0], torch.tensor(self.keep, dtype=torch.int64))
            logits[self.asked[1], :, : len(view)][..., gone] = -torch.inf
        return (logits.softmax(-1) @ values).transpose(0, 1).unsqueeze(0)


class PartWay:
    """A small part of the way from all frames to those that are kept."""

    def __init__(self, session, other, layer, share):
        self.session, self.other, self.layer, self.share = session, other, layer, share

    def attend(self, layer, q, k, v, step):
        out = self.session.attend(layer, q, k, v, step)
        if layer != self.layer:
            return out
        return out + self.share * (self.other.attend(layer, q, k, v, step) - out)


def whole(call, session):
    """The estimate of a pass from the first layer on."""
    step = replace(call.step, mode="scratch", opens=False)
    out = call.network(call.x, call.timesteps, call.text, session, step)
    return call.network.x0(out, call.x, call.timesteps)


@torch.no_grad()
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_start_at_a_heads_layer_is_a_whole_pass_with_a_mask(scorer):
    call, looked, _ = site()
    budgets = (0, 1, 5, 11, 12)
    kept = looked.kept(SCORERS[scorer], budgets)
    losses, floor = exact_losses(looked, kept, batch=4)
    assert floor < 1e-24 and float(losses[:, -1].max()) < 1e-24  # all frames: nothing changes
    dense = whole(call, Masked(call.session, 0, 0, tuple(range(12))))
    torch.testing.assert_close(dense, looked.x0, rtol=1e-10, atol=1e-12)
    for line, (layer, head) in enumerate((a, b) for a in range(3) for b in range(2)):
        for column, budget in enumerate(budgets):
            keep = kept[layer][column, head].nonzero().flatten().tolist()
            assert len(keep) == budget
            moved = whole(call, Masked(call.session, layer, head, keep))
            loss = (moved - dense).square().sum() / dense.square().sum()
            assert float(losses[line, column]) == pytest.approx(float(loss), rel=1e-8, abs=1e-22)


@torch.no_grad()
def test_a_start_at_a_layer_gives_the_same_bits():
    call, looked, _ = site()
    for layer in range(3):
        every = [torch.ones(1, 2, 12, dtype=torch.bool)] * 3
        losses, _ = exact_losses(looked, every, [(layer,)], batch=2)
        tokens, embedding = looked.tokens[layer], looked.embedding
        step = replace(call.step, mode="scratch", opens=False, final=())
        layers = range(layer, 3)
        tokens = call.network.through(tokens, embedding, call.text, call.session, step, layers)
        out = call.network.unpatch(tokens, embedding, call.x.shape)
        assert torch.equal(call.network.x0(out, call.x, call.timesteps), looked.x0)
        assert float(losses.max()) < 1e-24


@torch.no_grad()
def test_a_whole_head_and_a_whole_layer():
    call, looked, _ = site()

    class Silent:
        def __init__(self, layer, heads):
            self.layer, self.heads = layer, heads

        def attend(self, layer, q, k, v, step):
            out = call.session.attend(layer, q, k, v, step)
            if layer == self.layer:
                out[:, :, self.heads] = 0
            return out

    losses, _ = exact_losses(looked, None, [(1, 0), (1,)])
    for loss, heads in zip(losses[:, 0].tolist(), ([0], [0, 1]), strict=True):
        moved = whole(call, Silent(1, heads))
        expected = (moved - looked.x0).square().sum() / looked.x0.square().sum()
        assert loss == pytest.approx(float(expected), rel=1e-8)


@torch.no_grad()
def test_probes_of_every_coordinate_give_the_squared_derivative():
    call, looked, _ = site()
    kept = looked.kept(SCORERS["recency"], range(13))
    found = probe_products(looked, kept).square().sum(0)  # [L, H, N]
    assert float(found[..., -1].max()) < 1e-28
    for layer, head, budget in ((0, 0, 0), (0, 1, 4), (1, 0, 0), (2, 1, 7)):
        keep = list(range(12 - budget, 12))
        alone = Masked(call.session, layer, head, keep)
        changed = {}

        for share in (1e-4, -1e-4):
            changed[share] = whole(call, PartWay(call.session, alone, layer, share))
        slope = (changed[1e-4] - changed[-1e-4]) / 2e-4
        expected = float(slope.square().sum())
        assert float(found[layer, head, budget]) == pytest.approx(expected, rel=1e-5)


def test_blocks_that_run_again_give_the_same_gradients():
    _, kept, again = site()
    for a, b in zip(kept.gradients, again.gradients, strict=True):
        assert torch.equal(a[:3], b)


@torch.no_grad()
def test_shares_and_errors_are_those_of_a_mask():
    _, looked, _ = site()
    rows = torch.tensor([0, 2, 4, 8])
    kept = looked.kept(SCORERS["mass"], range(13))
    lost, errors = masses_and_errors(looked, kept, rows)
    assert float(lost[..., -1].abs().max()) < 1e-15 and float(errors[..., -1].abs().max()) < 1e-20
    assert bool((lost.diff(dim=-1) <= 1e-15).all())  # a longer list loses less
    network, tokens = looked.call.network, 3
    shapes = network.time_projection(looked.embedding).unflatten(-1, (6, -1))
    for layer, view in enumerate(looked.views):
        keys = torch.cat([view.keys("read"), view.own_keys()], 1)
        values = torch.cat([view.values(), view.own_values()], 1)
        logits = view.query[:, rows] @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        block = network.blocks[layer]
        gate = (block.modulation[0, 2] + shapes[0, :, 2])[rows // tokens]  # [R, dim]
        dense = (logits.softmax(-1) @ values).transpose(0, 1)  # [R, H, D]
        update = gate * torch.nn.functional.linear(dense.flatten(1), block.self_attn.o.weight)
        for head in range(2):
            for budget in (0, 3, 8):
                best = looked.masses[layer][head].argsort(descending=True)
                keep = best[:budget].tolist()
                mask = ~torch.isin(view.frame_id[0], torch.tensor(keep, dtype=torch.int64))
                own = logits.clone()
                own[head, :, : len(view)][:, mask] = -torch.inf
                missing = logits.softmax(-1)[head, :, : len(view)][:, mask].sum(-1).mean()
                assert float(lost[layer, head, budget]) == pytest.approx(float(missing))
                moved = (own.softmax(-1) @ values).transpose(0, 1) - dense
                moved = gate * torch.nn.functional.linear(
                    moved.flatten(1), block.self_attn.o.weight
                )
                expected = moved.square().sum() / update.square().sum()
                assert float(errors[layer, head, budget]) == pytest.approx(float(expected))


def test_the_plain_gradient_of_a_distillation_loss_is_no_measure():
    """At the unrestricted pass that loss is at its minimum, so all its gradients are zero."""
    call, looked, _ = site()
    gate = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)

    class Gated:
        def attend(self, layer, q, k, v, step):
            dense = call.session.attend(layer, q, k, v, step)
            bare = Masked(call.session, layer, slice(None), ()).attend(layer, q, k, v, step)
            return bare + gate[layer].unsqueeze(-1) * (dense - bare)

    loss = (whole(call, Gated()) - looked.x0).square().sum()
    (slope,) = torch.autograd.grad(loss, gate)
    with torch.no_grad():
        masked, _ = exact_losses(looked, [torch.zeros(1, 2, 12, dtype=torch.bool)] * 3)
    assert float(slope.abs().max()) < 1e-9 * float((masked * looked.norm).min())


def test_composition_is_a_softmax_over_what_is_kept():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 4, 6, generator=rng).double()  # H, R, U, rows of a unit
    values = torch.randn(2, 4, 6, generator=rng).double()
    lse = logits.logsumexp(-1)
    own = (logits.softmax(-1) * values.unsqueeze(1)).sum(-1)
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.5, 0.5, 0.7]])
    order = [[1, 2, 0], [2, 0, 1]]  # ties go to the earlier frame
    kept = kept_by_score(scores, (4, 5, 6), range(4))
    first = kept_by_score(scores, (0, 1, 6), range(4), sink=1)
    for head, sunk in enumerate(([0, 1, 2], [0, 2, 1])):
        for budget in range(4):
            assert set(kept[budget, head].nonzero().flatten().tolist()) == {*order[head][:budget]}
            assert set(first[budget, head].nonzero().flatten().tolist()) == {*sunk[:budget]}
    means, shares = kept_means(lse, own, kept), kept_shares(lse, kept)
    for head in range(2):
        for budget in range(4):
            keep = [3, *order[head][:budget]]
            mass = logits[head][:, keep].flatten(1).softmax(-1)
            expected = (mass * values[head, keep].flatten()).sum(-1)
            torch.testing.assert_close(means[head, :, budget], expected)
            part = logits[head].flatten(1).softmax(-1).unflatten(1, (4, 6))[:, keep].sum((1, 2))
            torch.testing.assert_close(shares[head, :, budget], part)


def test_what_cannot_be_taken_apart_is_refused():
    torch.manual_seed(0)
    model = VideoModel(CausalWan(TINY).double().eval(), None, encoder)
    ragged = policy_from_dict(
        {"name": "r", "retain": {"part": "heavy-hitters", "granularity": "token", "budget": "20t"}}
    )

    def note(call):
        if call.step.chunk == 3:
            look(call)

    with pytest.raises(ValueError, match="whole frames"):
        rollout(model, ragged, "a", 18, decode=False, before=note)
    with pytest.raises(ValueError, match="one clip at a time"):
        rollout(model, preset("full"), ["a", "b"], 18, decode=False, before=note)
