"""Expected Attention against plain Python, and its closed form against sampled queries."""

import cmath
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from lightning_kv import preset, rollout
from lightning_kv.cache.rotary import rotate
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.policies.retain.expected_attention import ExpectedAttention
from lightning_kv.policies.statistics import Moments
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    without_commits,
)


class ExpectedScript(Script):
    """The method once more, in complex numbers, one row of one head at a time."""

    def __init__(
        self,
        frames,  # of each head, a list per layer
        horizon=12,
        epsilon=0.0,
        covariance=True,
        sink=0,
        granularity="frame",
    ):
        self.frames, self.horizon, self.epsilon = frames, horizon, epsilon
        self.covariance, self.sink, self.by_row = covariance, sink, granularity == "token"
        self.passes, self.dropped = {}, 0  # mean and second moment of the queries of each pass

    def look(self, stream, step, q, k):
        if step.phase == "denoise" or not step.final or step.rebuild:
            return
        own = [query.raw.tolist() for query in stream.queries if query.frame in step.final]
        size = range(len(own[0]))
        mean = [sum(x[a] for x in own) / len(own) for a in size]
        square = [[sum(x[a] * x[b] for x in own) / len(own) for b in size] for a in size]
        self.passes.setdefault(self.key(stream), []).append((mean, square))

    def commit(self, stream, step):
        most = self.frames[stream.layer][stream.head] * stream.geometry.tokens
        if len(stream.rows) <= most:
            return
        scores = self.scores(stream, step.final[-1] + 1)
        unit = [i if self.by_row else row.frame for i, row in enumerate(stream.rows)]
        total = {}
        for name, score in zip(unit, scores, strict=True):
            total[name] = total.get(name, 0.0) + score
        kept, safe = (
            [],
            {
                name
                for name, row in zip(unit, stream.rows, strict=True)
                if row.frame < self.sink or row.frame in step.final
            },
        )
        for name in sorted(total, key=lambda u: (u not in safe, -total[u], u)):
            if len(kept) + unit.count(name) > most:
                break
            kept += [i for i, own in enumerate(unit) if own == name]
        self.dropped += len(stream.rows) - len(kept)
        stream.rows = [stream.rows[i] for i in sorted(kept)]

    def scores(self, stream, start):
        """Expected attention times length of the value, of every row."""
        seen = self.passes[self.key(stream)]
        size = range(len(seen[0][0]))
        mean = [sum(own[0][a] for own in seen) / len(seen) for a in size]
        spread = [
            [sum(own[1][a][b] for own in seen) / len(seen) - mean[a] * mean[b] for b in size]
            for a in size
        ]
        logits = [self.logit(stream.geometry, row, mean, spread, start) for row in stream.rows]
        top = max(logits)
        share = [math.exp(x - top) for x in logits]
        lengths = [math.sqrt(sum(x * x for x in row.v.tolist())) for row in stream.rows]
        pairs = zip(share, lengths, strict=True)
        return [(x / sum(share) + self.epsilon) * length for x, length in pairs]

    def logit(self, geometry, row, mean, spread, start):
        """Mean logit and half the variance: queries at the row's place, over the next frames."""
        side = 2 * (geometry.head_dim // 6)
        widths, at = (geometry.head_dim - 2 * side, side, side), 0
        row_at, column_at = divmod(int(row.place), geometry.grid[1])
        key, met = row.k.tolist(), []
        for axis, width in enumerate(widths):
            for pair in range(width // 2):
                speed = geometry.rotary.theta[axis] ** (-2 * pair / width)
                here = (row.time, row_at, column_at)[axis]
                turned = complex(key[at], key[at + 1]) * cmath.exp(1j * speed * here)
                asked = [start + i for i in range(self.horizon)] if axis == 0 else [here]
                turn = sum(cmath.exp(1j * speed * x) for x in asked) / len(asked)
                # Re(q turn conj(turned)) of a query q before rotation, as a sum over its numbers
                product = turn.conjugate() * turned
                met += [product.real, product.imag]
                at += 2
        width = geometry.head_dim
        logit = sum(m * x for m, x in zip(mean, met, strict=True)) / math.sqrt(width)
        if self.covariance:
            pairs = [(a, b) for a in range(width) for b in range(width)]
            logit += sum(met[a] * spread[a][b] * met[b] for a, b in pairs) / (2 * width)
        return logit

    @staticmethod
    def key(stream):
        return stream.namespace, stream.sample, stream.layer, stream.head


def policy(budget, **settings):
    part = {"part": "expected-attention", "budget": budget, **settings}
    return policy_from_dict({"name": "x", "retain": part})


def amounts(budget, layers, heads):
    """Frames of each head under a budget, by hand."""
    if isinstance(budget, str):
        return [[int(budget[:-1])] * heads] * layers
    frames = int(budget["amount"][:-1])
    return [[round(share * frames) for share in own] for own in budget["shares"]]


def ragged(amount, *shares):
    """A budget for each head of two layers."""
    return {"part": "table", "amount": amount, "shares": [list(shares), list(shares[::-1])]}


CASES = {
    "three frames": ("6f", {}, chunked([3] * 14, noisy=1), {"heads": 4, "grid": (1, 2)}),
    "single frames": (
        "3f",
        {"horizon": 1},
        chunked([1] * 14, noisy=1),
        {"heads": 4, "grid": (2, 2)},
    ),
    "ragged, a sink": (
        ragged("5f", 1.4, 1.0, 0.6, 0.8),
        {"sink": 1},
        chunked([2] * 14, noisy=1),
        {"heads": 4, "grid": (1, 3)},
    ),
    "rows": (
        "3f",
        {"granularity": "token", "epsilon": 0.02},
        chunked([2] * 14, noisy=1, context=2),
        {"heads": 5, "grid": (3, 1)},
    ),
    "rows, ragged, a sink, short last chunk": (
        ragged("6f", 1.0, 1.5, 0.9, 1.25),
        {"granularity": "token", "sink": 1, "horizon": 5, "epsilon": 0.02},
        chunked([4] * 13 + [2], noisy=0),
        {"heads": 4, "grid": (1, 2)},
    ),
    "mean alone": (
        "4f",
        {"covariance": False, "epsilon": 0.1},
        chunked([2] * 14, noisy=1),
        {"heads": 4, "grid": (1, 3), "gain": 4.0},
    ),
    "guided": (
        "3f",
        {"sink": 1},
        guided(chunked([1] * 14, noisy=1)),
        {"heads": 2, "grid": (2, 2), "head_dim": 18},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_every_decision_is_the_twins(case):
    """Over 14 chunks; in float64, so that only what is equal on purpose comes near a tie."""
    budget, settings, steps, world = CASES[case]
    tape = random_tape(steps, batch=2, dtype=torch.float64, **world)
    script = ExpectedScript(amounts(budget, 2, world["heads"]), **settings)
    found = compare_decisions(policy(budget, **settings), script, tape)
    assert found.total >= 200
    assert found.equal == found.total
    assert script.dropped > 0


@pytest.mark.parametrize("case", ["ragged, a sink", "rows"])
def test_outputs_and_rows_are_the_twins(case):
    budget, settings, steps, world = CASES[case]
    tape = random_tape(steps, **world).cut(20)
    script = ExpectedScript(amounts(budget, 2, world["heads"]), **settings)
    assert_same_as_twin(policy(budget, **settings), script, tape)


# -- the closed form -------------------------------------------------------------------------


@dataclass(frozen=True)
class Noting(ExpectedAttention):
    """Keeps the views of the next chunk that it was given."""

    seen: Any = field(default_factory=list, hash=False)

    def logits(self, ahead, queries):
        self.seen.append(ahead)
        return super().logits(ahead, queries)


def a_look_ahead():
    """The view of one layer before chunk 4 of three frames, with 3 + 3 frames of 6 rows."""
    made = policy("3f")
    noting = Noting(made.retain.budget)
    tape = random_tape(chunked([3] * 4, noisy=1), layers=1, heads=2, grid=(2, 3))
    for _ in tape.running(tape.session(replace(made, retain=noting))):
        pass
    return noting.seen[-1]


@pytest.mark.parametrize("horizon", [1, 12])
@pytest.mark.parametrize("covariance", [True, False])
def test_the_mean_over_sampled_queries(horizon, covariance):
    """exp of the formula is the mean of exp(logit) over Gaussian queries, turned as they will be.

    With a horizon, the mean turned query takes the place of the queries of all its frames.
    """
    ahead, draws = a_look_ahead(), 40_000
    rng = torch.Generator().manual_seed(0)
    heads, width = ahead.heads, ahead.geometry.head_dim
    mean = 0.5 * torch.randn(heads, width, generator=rng)
    factor = 0.2 * torch.randn(heads, width, width, generator=rng) * covariance
    noise = torch.randn(heads, draws, width, generator=rng)
    noise = (noise - noise.mean(1, keepdim=True)) * covariance
    queries = mean.unsqueeze(1) + noise @ factor.transpose(1, 2)
    moments = Moments(
        mean.unsqueeze(1), torch.empty(0), torch.empty(0), 1, factor @ factor.transpose(1, 2)
    )
    part = ExpectedAttention(horizon=horizon, covariance=covariance)
    found = part.logits(ahead, moments).exp()
    keys, times = ahead.keys("read"), ahead.step.query_times[0] + torch.arange(horizon)
    assert ahead.step.start == 12 and len(ahead) == 36
    for row in range(0, len(ahead), 7):
        place = ahead.place[0, row]
        turned = sum(rotate(queries, ahead.angles(time, place)) for time in times) / horizon
        logits = (turned @ keys[:, row].unsqueeze(-1))[..., 0] / width**0.5
        expected = logits.double().exp().mean(1).float()
        torch.testing.assert_close(found[:, row], expected, rtol=0.01, atol=0)


def test_far_keys_count_less_where_rotation_is_fast():
    """Over many frames a fast pair averages to nothing, and a spatial pair keeps all."""
    ahead = a_look_ahead()
    near, far = (ExpectedAttention(horizon=h).turned_back(ahead) for h in (1, 1000))
    raw = ahead.keys("raw")
    length = [x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (raw, near, far)]
    torch.testing.assert_close(length[1], length[0])
    assert (length[2][..., 0] <= 0.01 * length[0][..., 0]).all()
    torch.testing.assert_close(far[..., 4:], raw[..., 4:])


# -- what cannot be --------------------------------------------------------------------------


def test_a_sampler_without_clean_passes_is_refused():
    tape = random_tape(without_commits(chunked([3] * 4)))
    with pytest.raises(ValueError, match="no query of a clean pass"):
        tape.play(policy("3f"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"horizon": 0}, "horizon"), ({"epsilon": -0.1}, "epsilon"), ({"sink": -1}, "sink")],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy("9f", **settings)


def test_it_counts_every_key_once(panorama):
    out = rollout(panorama, preset("expected-attention@6f"), "dusk fast n10 left", 12)
    # two commits find more than 6 frames of 16 rows: 9 each, in 24 streams
    assert out.costs[0].rows_scored == 2 * 9 * 16 * 24
