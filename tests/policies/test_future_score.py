"""The closed form of a future query's logit, against cosines one by one and against Future Forcing.

Echo-Forcing's score is the one complete public form of a "future query" from statistics taken
during the rollout; the mean proxy of our Future Forcing must say the same of the same key.
"""

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lightning_kv.cache.rotary import Rotary, rotate
from lightning_kv.policies.base import CachePolicy, RetainPart
from lightning_kv.policies.future_score import QueryMeans, future_scores, update_query_means
from lightning_kv.policies.registry import preset
from lightning_kv.policies.retain.future.proxies import expected_mass, future_queries
from lightning_kv.policies.statistics import update_moments
from lightning_kv.testing import chunked, random_tape

ROTARY = Rotary(12)


def frequencies(rotary):
    """Those of time; the pairs of both axes of place stand still."""
    time = rotary.axes[0]
    still = (rotary.head_dim - time) // 2
    return [rotary.theta[0] ** (-2 * f / time) for f in range(time // 2)] + [0.0] * still


def pairs(vector):
    """Complex numbers of a real vector."""
    return [complex(a, b) for a, b in vector.double().view(-1, 2).tolist()]


def closed_form(mean, length, key, distance, gate, rotary=ROTARY):
    """One head, one key, one distance: a sum over complex pairs."""
    total = 0.0
    for w, q, size, k in zip(frequencies(rotary), pairs(mean), length, pairs(key), strict=True):
        angle = math.atan2((q * k.conjugate()).imag, (q * k.conjugate()).real)
        total += abs(q) * abs(k) * math.cos(w * distance + angle)
        total += gate * (size - abs(q)) * abs(k)
    return total


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
def test_scores_are_cosines_summed_one_by_one(gate):
    queries, keys, rng = drawn(3, 40, 12), drawn(3, 7, 12, seed=1), random.Random(2)
    lag = torch.tensor([[rng.randrange(1, 60) for _ in range(7)]])
    offsets = (1, 2, 4, 8, 16)
    length = queries.unflatten(-1, (-1, 2)).norm(dim=-1).mean(1)
    means = QueryMeans(queries.mean(1), length, 40)
    found = future_scores(means, keys, lag, offsets, ROTARY, gate)
    for head in range(3):
        for row in range(7):
            own = means.mean[head], length[head].tolist(), keys[head, row]
            each = [closed_form(*own, int(lag[0, row]) + o, gate) for o in offsets]
            assert float(found[head, row]) == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_queries_that_are_all_alike_leave_the_key_lengths_out():
    """Then the mean length is the length of the mean, and the gate has nothing to open."""
    query, keys = drawn(2, 1, 12), drawn(2, 5, 12, seed=3)
    seen = query.expand(-1, 9, -1)
    means = QueryMeans(seen.mean(1), seen.unflatten(-1, (-1, 2)).norm(dim=-1).mean(1), 9)
    lag = torch.arange(5).unsqueeze(0)
    shut, open_ = (future_scores(means, keys, lag, (3,), ROTARY, gate) for gate in (0.0, 1.0))
    torch.testing.assert_close(shut, open_, atol=1e-12, rtol=0)


@dataclass(frozen=True)
class Both(RetainPart):
    """Future Forcing's mean proxy and the closed form, of the same rows of a running cache."""

    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    offset: int = 4
    until: int = 1000

    def observe(self, view, state):
        update_moments(view, state)
        update_query_means(view, state, self.until)

    def commit(self, views, state):
        for view in views:
            ahead, means = view.ahead(), state["query_means"][view.layer]
            moments = state["moments"][view.layer]
            asked = future_queries(moments, ahead, 2 * self.offset, 2)
            mass = expected_mass(view, ahead, asked, variance=False)[:, 1]
            lag = ahead.step.query_times[0] - view.time
            keys, rotary = view.keys("raw"), view.geometry.rotary
            closed = future_scores(means, keys, lag, (self.offset,), rotary, 0.0)
            turned = asked.query[:, 1], ahead.keys("read"), ahead.step.query_times[0]
            state.setdefault("seen", []).append((keys, means, mass, closed, lag, turned))


def policy(**settings):
    full = preset("full")
    return CachePolicy("x", Both(**settings), full.select, full.positions, full.precision)


@pytest.mark.parametrize("offset", [1, 4, 16])
def test_future_forcing_expects_what_echo_forcing_scores(offset):
    """The anchor: spatial rotation is off in a frame of one token.

    The mean proxy's logit, taken back out of its softmax, is the closed form; and so is the product
    of the mean query and the key, each turned to its own time.
    """
    tape = random_tape(chunked([3] * 5, noisy=0), grid=(1, 1), dtype=torch.float64, gain=1.0)
    session = tape.session(policy(offset=offset))
    tape.play(session)
    seen = session.samples[0].states["cond"]["retain"]["seen"]
    for rows, means, mass, closed, lag, (query, keys, start) in seen:
        logits = mass.log() * 12**0.5
        gap = (logits - logits[:, :1]) - (closed - closed[:, :1])
        assert float(gap.abs().max()) < 1e-6
        product = torch.einsum("hd,hnd->hn", query, keys)
        torch.testing.assert_close(product, closed, atol=1e-6, rtol=0)
        still = torch.zeros((), dtype=torch.float64)
        at = torch.tensor(start + offset, dtype=torch.float64)
        turned = rotate(means.mean, ROTARY.angles(at, still, still))
        torch.testing.assert_close(turned, query, atol=1e-6, rtol=0)
        own = means.mean[0], means.length[0].tolist()
        each = [
            closed_form(*own, key, float(lag[0, n]) + offset, 0.0) for n, key in enumerate(rows[0])
        ]
        assert closed[0].tolist() == pytest.approx(each, abs=1e-6)


def test_means_are_those_of_all_clean_queries_up_to_the_horizon():
    tape = random_tape(chunked([3, 3, 2, 3]), dtype=torch.float64, layers=1)
    session = tape.session(policy(until=8))
    tape.play(session)
    clean = [e.layers[0][0][0] for e in tape.entries if e.step.final and e.step.chunk < 3]
    seen = torch.cat(clean).transpose(0, 1)  # [H, T, D]
    means = session.samples[0].states["cond"]["retain"]["query_means"][0]
    assert means.rows == seen.shape[1] == 8 * 6
    torch.testing.assert_close(means.mean, seen.mean(1))
    length = seen.unflatten(-1, (-1, 2)).norm(dim=-1).mean(1)
    torch.testing.assert_close(means.length, length)
