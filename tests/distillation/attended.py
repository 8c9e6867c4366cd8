"""Attention of a few queries to rows of frames, with the tables that a recorder would make of it.

Sets of frames are judged by a softmax over their rows, in float64.
"""

import torch

from lightning_kv.cache.mass import FrameMass
from lightning_kv.cache.outputs import FrameOutputs, Outputs
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.recorder import Clip
from lightning_kv.cache.rotary import Rotary
from lightning_kv.policies.hindsight import Place

HEADS, TOKENS, WIDTH, CHUNK = 2, 2, 6, 2
WEIGHTS = (1.0, 1.0, 1.0, 0.5)  # of the queries of a chunk


class Attended:
    """Every chunk's queries see all frames up to their own; values of a row are always the same.

    Args:
        seed: Of logits and values.
        chunks: Of the clip.
        loud: How much logits differ.
        layers: All alike but for their numbers.
    """

    def __init__(self, seed=0, chunks=5, loud=2.0, layers=1):
        rng = torch.Generator().manual_seed(seed)
        frames = chunks * CHUNK
        self.values = torch.randn(layers, HEADS, frames, TOKENS, WIDTH, generator=rng).double()
        self.logits = {
            (chunk, layer): loud
            * torch.randn(HEADS, len(WEIGHTS), (chunk + 1) * CHUNK, TOKENS, generator=rng).double()
            for chunk in range(chunks)
            for layer in range(layers)
        }
        geometry = Geometry(layers, HEADS, WIDTH, (1, TOKENS), Rotary(WIDTH), 21, chunk=CHUNK)
        self.clip = Clip("a", 0, frames, chunks, geometry)

    def output(self, chunk, layer, head, query, kept=None):
        """Of one query, over all frames or those that are kept."""
        logits = self.logits[chunk, layer][head, query]
        some = sorted(kept) if kept is not None else list(range(len(logits)))
        mass = logits[some].flatten().softmax(0)
        return mass @ self.values[layer, head, some].flatten(0, 1)

    def error(self, chunk, layer, head, query, kept):
        """Squared, of what is kept."""
        whole = self.output(chunk, layer, head, query)
        return float((self.output(chunk, layer, head, query, kept) - whole).square().sum())

    def loss(self, chunks, layer, head, kept, made, discount):
        """Weighted error of all queries of some chunks, which also see what is made later."""
        total = 0.0
        for ahead, chunk in enumerate(chunks):
            seen = {*kept, *range(made, (chunk + 1) * CHUNK)}
            for query, weight in enumerate(WEIGHTS):
                error = self.error(chunk, layer, head, query, seen)
                total += discount**ahead * weight / sum(WEIGHTS) * error
        return total

    def mass(self, chunk, layer, head):
        """Softmax mass of each frame, mean over the queries."""
        share = self.logits[chunk, layer][head].flatten(1).softmax(-1).unflatten(1, (-1, TOKENS))
        weight = torch.tensor(WEIGHTS).double() / sum(WEIGHTS)
        return (weight @ share.sum(-1)).tolist()

    @property
    def tables(self):
        """As recorders make them."""
        of = self.clip
        mass = torch.zeros(of.chunks, of.geometry.layers, HEADS, of.frames)
        outputs = {}
        for (chunk, layer), logits in self.logits.items():
            for head in range(HEADS):
                line = torch.tensor(self.mass(chunk, layer, head))
                mass[chunk, layer, head, : len(line)] = line
            rows = logits.flatten(2).softmax(-1).unflatten(2, (-1, TOKENS))  # [H, E, F, T]
            share, seen = rows.sum(-1), self.values[layer, :, : rows.shape[2]]
            own = torch.einsum("heft,hftd->hefd", rows, seen)
            pull = own - share.unsqueeze(-1) * own.sum(2, keepdim=True)
            frames, weight = tuple(range(rows.shape[2])), torch.tensor(WEIGHTS)
            outputs["cond", chunk, layer] = Outputs(frames, share.float(), pull.float(), weight)
        return {
            "mass": FrameMass(of, {"cond": mass}, len(WEIGHTS)),
            "outputs": FrameOutputs(of, outputs, len(WEIGHTS)),
        }


def place(frames, made, layer=0, present=None):
    """A place where each head has all of these frames, or those that are said."""
    present = [[True] * len(frames)] if present is None else present
    return Place("cond", layer, tuple(frames), torch.tensor(present), made)
