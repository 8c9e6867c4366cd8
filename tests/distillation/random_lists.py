"""Lists with random features and targets, and outputs of real queries, keys and values."""

from dataclasses import dataclass

import torch

from lightning_kv.distillation.lists import Lists

TOKENS, WIDTH = 3, 4


@dataclass
class Attention:
    """What the outputs of lists were computed from, float64."""

    logits: torch.Tensor  # [N, R, U + 1, TOKENS], minus infinity where there is nothing
    values: torch.Tensor  # [N, U + 1, TOKENS, WIDTH]
    query: torch.Tensor  # [N, R]

    def error(self, kept):
        """Mean squared error of attention that sees some frames, and the last place, alone."""
        whole = self.over(torch.ones_like(kept))
        square = (self.over(kept) - whole).square().sum(-1)
        return (square * self.query).sum(-1) / self.query.sum(-1)

    def greedy(self, candidate):
        """In which order frames should be taken, U for the first, as targets ``[N, U]``."""
        target, line = torch.zeros(candidate.shape), torch.arange(len(candidate))
        for step in range(candidate.shape[1]):
            errors = []
            for u in range(candidate.shape[1]):
                kept = (target > 0).clone()
                kept[:, u] = True
                errors.append(self.error(kept).masked_fill((target > 0)[:, u], torch.inf))
            target[line, torch.stack(errors).argmin(0)] = float(candidate.shape[1] - step)
        return target * candidate

    def over(self, kept):
        """Attention over the frames kept, ``[N, R, WIDTH]``."""
        seen = torch.nn.functional.pad(kept, (0, 1), value=True)
        logits = self.logits.masked_fill(~seen[:, None, :, None], -torch.inf)
        return logits.flatten(2).softmax(-1) @ self.values.flatten(1, 2)


def random_lists(count=40, places=7, queries=3, features=5, context=2, seed=0, full=False):
    """Lists of 0 to all places, and the attention behind their outputs."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    def below(most):
        return torch.randint(most, (count,), generator=rng)

    length = torch.full((count,), places) if full else below(places + 1)
    candidate = torch.arange(places) < length.unsqueeze(1)
    target = normal(count, places).abs() * (torch.rand(count, places, generator=rng) < 0.8)
    attention = Attention(
        (1.5 * normal(count, queries, places + 1, TOKENS)).double(),
        normal(count, places + 1, TOKENS, WIDTH).double(),
        torch.rand(count, queries, generator=rng).double() + 0.1,
    )
    present = torch.nn.functional.pad(candidate, (0, 1), value=True)
    attention.logits.masked_fill_(~present[:, None, :, None], -torch.inf)
    mass = attention.logits.flatten(2).softmax(-1).unflatten(-1, (places + 1, TOKENS))
    share = mass.sum(-1)
    inside = torch.einsum("nrut,nutd->nrud", mass, attention.values)
    pull = inside - share.unsqueeze(-1) * inside.sum(2, keepdim=True)
    lists = Lists(
        features=normal(count, places, features),
        context=normal(count, context),
        candidate=candidate,
        target=target * candidate,
        layer=below(3),
        head=below(4),
        clip=below(5),
        weight=torch.rand(count, generator=rng) + 0.5,
        keep=(length * 2) // 3,
        share=share.float(),
        gram=torch.einsum("nrud,nrvd->nruv", pull, pull).float(),
        query=attention.query.float(),
    )
    return lists, attention


def weighted_mean(values, weight):
    """Of a loss over lists."""
    return (values * weight).sum() / weight.sum()
