"""Rules that label heads, against loops over single heads, chunks and frames."""

import cmath
import math
from itertools import pairwise

import pytest
import torch

from lightning_kv.policies import profiles
from lightning_kv.policies.profiles import RULES, Profile
from lightning_kv.policies.tables import HeadTable, shipped


def drawn(seed, starts, layers=2, heads=4):
    """Mass that prefers near frames in some heads, and curves of many shapes."""
    rng, frames = torch.Generator().manual_seed(seed), starts[-1]
    mass = torch.rand(len(starts) - 1, layers, heads, frames, generator=rng) ** 4
    slope = torch.rand(layers, heads, generator=rng) * 2
    for chunk, end in enumerate(starts[1:]):
        away = (end - torch.arange(frames)).clamp_min(1)
        mass[chunk] *= away ** -slope.unsqueeze(-1)
        if chunk % 2:
            mass[chunk, 0, ..., :2] *= 9
        mass[chunk, ..., end:] = 0
    mass /= mass.sum(-1, keepdim=True)
    lags, curves = torch.arange(frames), []
    for i in range(layers * heads):
        period, slope = 2 + 3 * i, torch.randn((), generator=rng)
        wave = torch.cos(2 * math.pi * lags / period)
        curves.append(wave + 0.1 * slope * lags + 0.2 * torch.randn(frames, generator=rng) - slope)
    return Profile(mass, tuple(starts), torch.stack(curves).unflatten(0, (layers, heads)))


def near_share(profile, layer, head, sink):
    found = []
    for chunk in range(len(profile.starts) - 1):
        start, end = profile.starts[chunk : chunk + 2]
        own = profile.mass[chunk, layer, head].tolist()
        if start > sink + 1:
            found.append(sum(own[start - 1 : end]) / sum(own[sink:end]))
    return sum(found) / len(found)


def slow_head_forcing(profile, layer, head):
    last, first = [], []
    for chunk in range(len(profile.starts) - 1):
        start = profile.starts[chunk]
        own = profile.mass[chunk, layer, head].tolist()[:start]
        if start >= 7:
            last.append(sum(own[-3:]) / sum(own))
            first.append(sum(own[:3]) / sum(own))
    if sum(last) / len(last) >= 0.6:
        return "local"
    return "anchor" if sum(first) / len(first) >= 0.5 else "memory"


def slow_pyramid(profile, layer, head):
    curve = profile.logits[layer, head].tolist()[1:]
    n, mean = len(curve), sum(curve) / len(curve)
    centre = (n - 1) / 2
    slope = sum((i - centre) * y for i, y in enumerate(curve))
    slope /= sum((i - centre) ** 2 for i in range(n))
    flat = [y - mean - slope * (i - centre) for i, y in enumerate(curve)]
    steps = [b - a for a, b in pairwise(flat)]
    turns = sum(a * b < 0 for a, b in pairwise(steps)) / (n - 2)
    periods = [16 * n / k for k in range(16, 8 * n + 1)]
    power = [
        abs(sum(y * cmath.exp(-2j * math.pi * i / period) for i, y in enumerate(flat)))
        for period in periods
    ]
    if turns >= 0.8 or periods[power.index(max(power))] <= 6.4:
        return "wave"
    others = [own[1:] for own in profile.logits[layer].double().tolist()]
    means = [sum(own) / len(own) for own in others]
    return "anchor" if mean > sum(means) / len(means) else "veil"


SLOW = {
    "forcing-kv": lambda *at: "static" if near_share(*at, 3) >= 0.8 else "dynamic",
    "head-forcing": slow_head_forcing,
    "pyramid-forcing": slow_pyramid,
}


@pytest.mark.parametrize("method", RULES)
def test_every_label_is_the_slow_rules(method):
    """In chunks of 1, 2, 3 and 4, a shorter last one; 320 heads of each rule."""
    words, least = [], 37 if method == "pyramid-forcing" else 20
    for seed, size in enumerate([1, 2, 3, 4] * 10):
        made = drawn(seed, [*range(0, least, size), least + seed % 3])
        for layer, row in enumerate(RULES[method](made)):
            for head, word in enumerate(row):
                assert word == SLOW[method](made, layer, head), f"{seed}: {layer} {head}"
                words.append(word)
    kinds = 2 if method == "forcing-kv" else 3
    assert len(words) == 320 and len(set(words)) == kinds


def one_head(curve):
    return Profile(torch.zeros(0), (), torch.tensor(curve, dtype=torch.float64).view(1, 1, -1))


@pytest.mark.parametrize("lags", [36, 47, 59, 60, 64, 71])
@pytest.mark.parametrize("phase", [0.0, 1.0, 2.0])
def test_a_turn_of_the_fastest_rotary_pair_is_a_wave_however_many_lags_there_are(lags, phase):
    """In 2 pi frames; 59 lags have 9.4 of them, and whole waves of 6.6 and 5.9 frames."""

    def curve(period, slow):
        turn, drift = 2 * math.pi / period, 2 * math.pi / 35
        return [math.cos(turn * i + phase) + slow * math.cos(drift * i) for i in range(lags + 1)]

    assert profiles.pyramid_forcing(one_head(curve(2 * math.pi, 0.5))) == [["wave"]]
    assert profiles.pyramid_forcing(one_head(curve(2 * math.pi, 2.0))) == [["veil"]]
    assert profiles.pyramid_forcing(one_head(curve(7.5, 0.0))) == [["veil"]]


def test_retrieval_heads_are_those_that_lose_most():
    losses = torch.tensor([[0.1, 0.5, 0.2], [0.2, 0.0, 0.9]])
    yes, no = "retrieval", "streaming"
    assert profiles.duo_attention(losses) == [[no, yes, yes], [no, no, yes]]  # the earlier of two
    assert profiles.duo_attention(losses, 1 / 6) == [[no] * 3, [no, no, yes]]
    assert profiles.duo_attention(losses[:, :1], 0.25) == [[no], [yes]]  # half of one: up
    assert profiles.duo_attention(losses, 0) == [[no] * 3] * 2


def test_a_profile_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="Give longer rollouts"):
        profiles.head_forcing(drawn(0, [0, 3, 6]))
    with pytest.raises(ValueError, match=r"36 lags or more, and 35 were recorded\. Give longer"):
        profiles.pyramid_forcing(drawn(0, [*range(0, 37, 3)]))
    with pytest.raises(ValueError, match="No chunk has 5 frames of history"):
        profiles.forcing_kv(drawn(0, [0, 3]))


def test_a_head_that_sees_the_sink_alone_is_an_error():
    made = drawn(1, [0, 3, 6, 9])
    made.mass[2, 1, 3, 3:] = 0
    with pytest.raises(ValueError, match="nothing but the first 3 frames in chunk 2"):
        profiles.forcing_kv(made)


@pytest.mark.parametrize("method", RULES)
def test_the_embedded_model_has_labels_of_every_rule(method):
    table = shipped()[f"{method}-panorama"]
    assert table.models == ("panorama",) and table.method == method
    words = [word for row in table.rows for word in row]
    for word in set(words):
        assert f"{words.count(word)} {word}" in table.about
    assert "tools/head_labels.py" in table.source
    assert HeadTable.of(f"{method}-panorama").rows == table.rows
