"""What parts expect of queries to come, against queries that do come: Monte Carlo, end to end.

A rollout shows queries of one Gaussian; the statistics gathered on the way, put into the closed
form of the next commit, must foretell the mean exponential of the logits of fresh draws, turned to
the times and places at which they would be asked.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_kv.cache.rotary import rotate
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import preset
from lightning_kv.policies.retain.expected_attention import ExpectedAttention
from lightning_kv.policies.retain.future.expected import ExpectedPart
from lightning_kv.testing import chunked, random_tape

WIDTH, HEADS, DRAWS = 12, 2, 20_000


class Queries:
    """A Gaussian for each head; pairs spread alike in both directions where ``isotropic``."""

    def __init__(self, isotropic: bool) -> None:
        rng = torch.Generator().manual_seed(3)
        self.mean = 0.8 * torch.randn(HEADS, WIDTH, generator=rng)
        factor = 0.18 * torch.randn(HEADS, WIDTH, WIDTH, generator=rng)
        spread = torch.rand(HEADS, WIDTH // 2, generator=rng).repeat_interleave(2, -1)
        self.factor = torch.diag_embed(spread) if isotropic else factor

    def draw(self, count: int, seed: int) -> torch.Tensor:
        """``[H, count, D]``."""
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randn(HEADS, count, WIDTH, generator=rng)
        return self.mean.unsqueeze(1) + noise @ self.factor.transpose(1, 2)


def shown(queries: Queries) -> Any:
    """A tape of 8 chunks of 3 frames of 40 tokens whose queries come from a Gaussian."""
    tape = random_tape(chunked([3] * 8, noisy=0), layers=1, heads=HEADS, grid=(5, 8), gain=1.0)
    entries = []
    for i, entry in enumerate(tape.entries):
        q, k, v = entry.layers[0]
        q = queries.draw(q.shape[1], 100 + i).transpose(0, 1).unsqueeze(0)
        entries.append(replace(entry, layers=((q, k, v),)))
    return replace(tape, entries=tuple(entries))


@dataclass(frozen=True)
class Attention(ExpectedAttention):
    """Notes the view of the next chunk and the log-mean-exp that it expects."""

    seen: Any = field(default_factory=list, hash=False)

    def commit(self, views, state):
        ahead = views[0].ahead()
        self.seen.append((ahead, self.logits(ahead, state["moments"][0])))


@dataclass(frozen=True)
class Forcing(ExpectedPart):
    """The same of a mean query; after the softmax, so up to what all rows have in common."""

    seen: Any = field(default_factory=list, hash=False)

    def commit(self, views, state):
        found = self.expected(views[0], state)
        self.seen.append((found.ahead, found.mass[:, 0].log()))


def expected(part: Any, tape: Any) -> tuple[Any, torch.Tensor]:
    """The view of the next chunk at the last commit, and what is expected of its rows."""
    full = preset("full")
    tape.play(CachePolicy("x", part, full.select, full.positions, full.precision))
    return part.seen[-1]


def asked(queries: Queries, ahead: Any, rows: list[int], own_place: bool) -> torch.Tensor:
    """Log of the mean exponential of the logits of fresh queries, ``[H, rows]``."""
    fresh, found = queries.draw(DRAWS, 7), []
    keys, time = ahead.keys("read"), torch.tensor(float(ahead.step.query_times[0]))
    centre = torch.tensor([2.0, 3.5])  # of 5 x 8 tokens
    for row in rows:
        place = ahead.place[0, row] if own_place else centre
        turned = rotate(fresh, ahead.angles(time, place))
        logits = (turned @ keys[:, row].unsqueeze(-1))[..., 0] / WIDTH**0.5
        found.append(logits.double().exp().mean(1).log().float())
    return torch.stack(found, -1)


def test_expected_attention_foretells_what_is_asked():
    """Mean and full covariance, at the place of the key."""
    queries = Queries(isotropic=False)
    ahead, found = expected(Attention(horizon=1), shown(queries))
    rows = list(range(0, len(ahead), 97))
    torch.testing.assert_close(found[:, rows], asked(queries, ahead, rows, True), atol=0.1, rtol=0)


def test_future_forcing_foretells_what_is_asked():
    """The mean query with the log-moment-generating term, at the centre of the frame."""
    queries = Queries(isotropic=True)
    settings = {"proxy": "mean", "steps": 1, "rate": 0.0}
    ahead, found = expected(Forcing(variance=True, **settings), shown(queries))
    _, alone = expected(Forcing(**settings), shown(queries))
    rows = list(range(0, len(ahead), 97))
    fresh = asked(queries, ahead, rows, False)
    gaps = [x - x[:, :1] for x in (fresh, found[:, rows], alone[:, rows])]
    torch.testing.assert_close(gaps[1], gaps[0], atol=0.1, rtol=0)
    assert float((gaps[2] - gaps[0]).abs().max()) > 0.15, "without the term it would be wrong"
