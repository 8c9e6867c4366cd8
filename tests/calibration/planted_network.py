"""A tiny Wan of which it is known what the history of each head is worth."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_network import TINY, encoder

from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.registry import preset
from lightning_kv.rollout import rollout

LAYERS, HEADS, WIDTH = 2, 8, 16
REACH, FRAMES = 6, 15
SIZES = {"dim": HEADS * WIDTH, "layers": LAYERS, "heads": HEADS, "latent_size": (4, 8)}
CONFIG = replace(TINY, **SIZES, channels=4, model="tiny")


def bare_model(seed=0):
    """Heads as they are drawn: none is planted."""
    torch.manual_seed(seed)
    network = CausalWan(CONFIG).eval().requires_grad_(False)
    return VideoModel(network, None, lambda prompts: encoder(prompts).float(), name="tiny")


def planted_model(seed=0, present=2, loud=4.0, level=0.1):
    """Heads whose history is worth a log-normal amount, and some whose history is worth nothing.

    What the history of a head adds to the residual stream has the norm ``level a``, on clips that
    no test looks at, with ``ln a`` of a standard normal. Queries are sharper by a factor from 0.5
    to 3, so curves fall at different rates.

    Args:
        seed: Of everything.
        present: So many heads of a layer look at the chunk in flight alone.
        loud: These write so many times what the history of any head adds.
        level: Small enough that losses are those of a nearly linear network.

    Returns:
        The model, and the truth ``[L, H]``: a, and 0 for heads that look at the chunk alone.
    """
    model, rng = bare_model(seed), torch.Generator().manual_seed(1000 + seed)
    worth = torch.randn(LAYERS, HEADS, generator=rng).exp()
    sharp = 0.5 * 6 ** torch.rand(LAYERS, HEADS, generator=rng)
    blind = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    for layer, block in enumerate(model.network.blocks):
        blind[layer, torch.randperm(HEADS, generator=rng)[:present]] = True
        block.self_attn.norm_q.weight.mul_(sharp[layer].repeat_interleave(WIDTH))
        for head in blind[layer].nonzero().flatten().tolist():
            at_present(block.self_attn, slice(head * WIDTH, (head + 1) * WIDTH))
        whole, past = written(model, layer)
        size = torch.where(blind[layer], loud * worth.max() / whole, worth[layer] / past)
        block.self_attn.o.weight.mul_((level * size).repeat_interleave(WIDTH))
    return model, worth.masked_fill(blind, 0)


def at_present(attention, own):
    """Let a head look at the last frame in flight, whatever is in it; rotary time does it.

    Queries and keys are one vector each, in the pair that turns by 0.1 a frame, a quarter turn
    apart: logits are about ``-100 sin(0.1 lag)``, and lags go from -2 to 8 frames.
    """
    for layer, norm, turn in (
        (attention.q, attention.norm_q, (0.0, 1.0)),
        (attention.k, attention.norm_k, (1.0, 0.0)),
    ):
        layer.weight[own], layer.bias[own] = 0, 0
        layer.bias[own][2:4] = torch.tensor(turn).to(layer.bias)
        norm.weight[own] = 12


class Writes:
    """Stands in for the session: notes what heads of a layer write, and what of it is history's."""

    def __init__(self, session, layer, weight, gate):
        self.session, self.layer, self.weight, self.gate = session, layer, weight, gate

    def attend(self, layer, q, k, v, step):
        if layer == self.layer:
            view = self.session.view(layer, q, k, v, step)
            keys = torch.cat([view.keys("read"), view.own_keys()], 1)
            values = torch.cat([view.values(), view.own_values()], 1)
            logits = view.query @ keys.transpose(1, 2) / WIDTH**0.5
            whole = logits.softmax(-1) @ values  # [H, T, D]
            logits[..., : len(view)] = -torch.inf
            past = whole - logits.softmax(-1) @ values
            self.found = [self.norms(whole), self.norms(past)]
        return self.session.attend(layer, q, k, v, step)

    def norms(self, out):
        rows = out @ self.weight.T.unflatten(0, (HEADS, WIDTH))  # [H, T, dim]
        return (rows.unflatten(1, (3, -1)) * self.gate.unsqueeze(1)).flatten(1).norm(dim=1)


def written(model, layer):
    """Norms ``[H]`` of what each head of a layer writes, and of what its history adds to it."""
    found = []

    def before(call):
        if (call.step.chunk, call.step.phase) != (FRAMES // 3 - 1, "denoise"):
            return
        network, step = call.network, replace(call.step, mode="scratch", opens=False)
        block = network.blocks[layer]
        gate = block.attention_gate(network.modulation(network.embed(call.x, call.timesteps)[1]))
        seen = Writes(call.session, layer, block.self_attn.o.weight, gate[0])
        network(call.x, call.timesteps, call.text, seen, step)
        found.append(torch.stack(seen.found))

    window = preset(f"sliding-window@{REACH}f")
    for key in ("pilot 0", "pilot 1"):
        rollout(model, window, key, FRAMES, keys=[key], decode=False, before=before)
    return torch.stack(found).square().mean(0).sqrt().unbind()
