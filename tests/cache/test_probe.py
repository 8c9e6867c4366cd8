"""What the probe measures, against loops over rows that share no code with it."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from slow import (
    STORAGE,
    Ask,
    AskAtCommit,
    Scattered,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    tape,
    turn,
)

from lightning_kv import preset, rollout
from lightning_kv.cache import probe as module
from lightning_kv.cache.decisions import Retention, Selection, Sums
from lightning_kv.cache.probe import AttentionProbe
from lightning_kv.metrics.functional import output_error, retained_mass

LAYERS, HEADS, TOKENS, CHUNK = (
    sessions.GEOMETRY.layers,
    sessions.GEOMETRY.heads,
    sessions.GEOMETRY.tokens,
    sessions.CHUNK,
)


def probed(made, recorded, batch=1, steps=(1,), tokens=TOKENS, **settings):
    probe = AttentionProbe(steps, tokens, **settings)
    on = session(made, batch, watch=probe)
    play(on, recorded)
    return probe, on


def slow(recorded, reads, places=range(TOKENS), steps=(1,), time=None, extra=None):
    """Mass and error of each (sample, frame, layer, head): lists, one entry per step and query.

    ``reads(head, layer, query frame, row frame, row place, first frame of the chunk)`` is asked
    of past rows and of those in flight; ``time`` and ``extra`` say where the policy puts a past
    row, and what it adds to its logit.
    """
    past, found = {}, {}
    for step, layer, q, k, v in recorded:
        for b in range(len(q)):
            for h in range(HEADS):
                rows = past.setdefault((b, layer, h), [])
                flight = [
                    Row(f, p, k[b, i * TOKENS + p, h], v[b, i * TOKENS + p, h].double())
                    for i, f in enumerate(step.frames)
                    for p in range(TOKENS)
                ]
                mine = range(step.chunk * CHUNK, (step.chunk + 1) * CHUNK)
                asked = step.phase == "denoise" and step.step in steps
                for f in mine if asked else ():
                    for p in places:
                        query = turn(q[b, step.frames.index(f) * TOKENS + p, h], f, p)
                        pair = compare(query, rows, flight, (h, layer, f), reads, time, extra)
                        found.setdefault((b, f, layer, h), []).append(pair)
                rows += [row for row in flight if row.frame in step.final]
    return found


class Row:
    def __init__(self, frame, place, k, v):
        self.frame, self.place, self.k, self.v = frame, place, k, v
        self.key = turn(k, frame, place)


def compare(query, past, flight, who, reads, time, extra):
    every, own = [], []
    start = flight[0].frame
    for index, row in enumerate(past + flight):
        logit = float(query @ row.key) / math.sqrt(len(query))
        every.append((math.exp(logit), row.v))
        if not reads(*who, row.frame, row.place, start):
            continue
        if time and index < len(past):
            moved = turn(row.k, time(row.frame, start), row.place)
            logit = float(query @ moved) / math.sqrt(len(query))
        if extra and index < len(past):
            logit += extra(row.frame, start)
        own.append((math.exp(logit), row.v))
    (mass, out), (total, full) = (
        (sum(w for w, _ in pairs), sum(w * v for w, v in pairs) / sum(w for w, _ in pairs))
        for pairs in (own, every)
    )
    return mass / total, float((out - full).norm() / full.norm())


def agree(probe, found, batch=1, layers=range(LAYERS)):
    """Assert that curves and heads are means of what the loops found."""
    frames = sorted({key[1] for key in found})
    for b in range(batch):
        cells = {key[1:]: seen for key, seen in found.items() if key[0] == b}
        curves, heads = probe.curves(b), probe.heads(b)
        for i, name in enumerate(("retained_mass", "attention_error")):
            mean = {key: sum(x[i] for x in seen) / len(seen) for key, seen in cells.items()}
            assert heads[name].shape == (len(layers), HEADS)
            for row, layer in enumerate(layers):
                for h in range(HEADS):
                    own = [mean[f, layer, h] for f in frames]
                    assert heads[name][row, h].item() == pytest.approx(sum(own) / len(own), 1e-5)
            for f in frames:
                own = sorted(mean[f, layer, h] for layer in layers for h in range(HEADS))
                assert curves[name][f].item() == pytest.approx(sum(own) / len(own), 1e-5, 1e-6)
                worst = "retained_mass_p05" if i == 0 else "attention_error_p95"
                own = own if i == 0 else own[::-1]
                part = 0.05 * (len(own) - 1)  # between the worst two of few heads
                expected = own[0] + part * (own[1] - own[0])
                assert curves[worst][f].item() == pytest.approx(expected, 1e-5, 1e-6)


def in_window(head, layer, query, frame, place, start):
    """A sink of one frame and two more, beside the chunk."""
    return start <= 3 or frame == 0 or frame >= start - 2


WINDOW = {"part": "window", "budget": "3f", "sink": 1}


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_a_window_loses_what_a_slow_twin_says(tokens):
    """Two samples; one query of a frame (its corner), two (on its diagonal), and all of them."""
    recorded = tape(passes(5), batch=2, gain=2.0)
    probe, _ = probed(policy(retain=WINDOW), recorded, batch=2, tokens=tokens)
    places = {1: [0], 2: [0, 3], TOKENS: range(TOKENS)}[tokens]
    found = slow(recorded, in_window, places)
    agree(probe, found, batch=2)
    lost = probe.curves(0)["retained_mass"]
    assert lost[:4] == pytest.approx([1.0] * 4, abs=1e-6)
    assert (lost[4:] < 0.95).all()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("steps", [passes, lambda n: rolling(n, 3), lambda n: rolling(n, 2, False)])
def test_the_full_cache_loses_nothing(steps, storage, backend):
    probe = AttentionProbe([0])
    on = session(policy(positions=STORAGE[storage]), watch=probe, backend=backend)
    play(on, tape(steps(4), gain=3.0))
    curves = probe.curves(0)
    seen = slice(0, 8)
    for name in ("retained_mass", "retained_mass_p05"):
        assert (curves[name][seen] - 1).abs().max() <= 1e-6
    for name in ("attention_error", "attention_error_p95"):
        assert 0 < curves[name][seen].max() <= 1e-5


def test_reads_by_head_and_query_frame_and_in_flight():
    """Other rows for every head and query frame, of the chunk's own frames too."""

    def reads(head, layer, query, frame, place, start):
        return frame == query or (frame + 2 * place + head + query) % 3 > 0

    def question(view):
        flight = [(f, p) for f in view.step.frames for p in range(TOKENS)]
        there = [*zip(view.frame_id[0].tolist(), view.raster[0].tolist(), strict=True), *flight]
        hits = [
            [[reads(h, 0, f, *row, 0) for row in there] for f in view.step.frames]
            for h in range(HEADS)
        ]
        rows, current = torch.tensor(hits).split([len(view), view.flight], dim=2)
        return Selection(rows=rows, current=current)

    recorded = tape(passes(4))
    probe, _ = probed(policy(select=Ask(question=question)), recorded, steps=(0, 1))
    agree(probe, slow(recorded, reads, steps=(0, 1)))


def test_heads_that_keep_other_rows_and_other_numbers_of_them():
    rule = Scattered()

    def reads(head, layer, query, frame, place, start):
        return frame >= start or rule.stays(frame, place, head, layer)

    recorded = tape(passes(4))
    agree(probed(policy(retain=rule), recorded)[0], slow(recorded, reads))


def test_rows_that_moved_in_time_are_not_clamped_to_a_share():
    """A sink that follows the chunk: mass at its new place over mass at its own."""
    positions = {"part": "sink-lag", "sink": 2, "lag": 4}
    recorded = tape(passes(5), gain=3.0)
    probe, _ = probed(policy(positions=positions), recorded)

    def time(frame, start):
        return max(frame, start - 4 + frame) if frame < 2 else frame

    agree(probe, slow(recorded, lambda *_: True, time=time))
    assert probe.heads(0)["retained_mass"].max() > 1.001


def test_rows_of_more_weight_count_for_it():
    """Frames 2 and 3 come to stand for two tokens each: more mass than there ever was."""

    def question(views):
        if views[0].step.chunk != 1:
            return [None] * len(views)
        view, rows = views[0], torch.arange(CHUNK * TOKENS).unsqueeze(0)
        own = [view.field(name)[:, CHUNK * TOKENS :] for name in ("frame_id", "time", "place")]
        ones = torch.ones(rows.shape)
        sums = Sums(rows + rows.shape[1], rows, ones, *own, weight=2 * ones)
        keep = torch.arange(len(view)).unsqueeze(0) < CHUNK * TOKENS
        return [Retention(keep=keep, sums=sums)] * len(views)

    recorded = tape(passes(4))
    made = policy(retain=AskAtCommit(question=question), bias="log_weight")
    probe, _ = probed(made, recorded)
    found = slow(recorded, lambda *_: True, extra=lambda f, _: math.log(2) * (f in (2, 3)))
    agree(probe, found)
    assert (probe.curves(0)["retained_mass"][4:] > 1.05).all()


def test_of_several_chunks_in_flight_the_oldest_counts():
    recorded = tape(rolling(4, 3))
    probe, _ = probed(policy(retain=WINDOW), recorded, steps=(0,))
    agree(probe, slow(recorded, in_window, steps=(0,)))
    assert probe.curves(0)["retained_mass"].isnan().tolist() == [False] * 8 + [True] * 4


def test_given_frames_are_remembered_and_have_no_numbers():
    steps = [replace(s, phase="prefill") if s.chunk == 0 else s for s in passes(3)]
    recorded = tape(s for s in steps if s.phase != "prefill" or s.final)
    probe, _ = probed(policy(retain={"part": "window", "budget": "1f"}), recorded)
    agree(probe, slow(recorded, lambda h, n, q, frame, p, start: frame >= start - 1))
    assert probe.curves(0)["attention_error"].isnan().tolist() == [True, True] + [False] * 4


def test_only_the_cond_namespace_is_watched_and_rebuilds_are_not():
    """Both branches of every pass, and one rebuild pass after every commit."""
    recorded = tape(passes(4))
    made = policy(retain=WINDOW)
    alone, _ = probed(made, recorded)
    probe = AttentionProbe([1], TOKENS)
    on = session(made, watch=probe)
    for step, layer, q, k, v in recorded:
        on.attend(layer, q, k, v, step)
        on.attend(layer, v, q, k, replace(step, namespace="uncond"))
        if step.final:
            on.attend(layer, q, k, v, replace(step, rebuild=True))
        if layer == LAYERS - 1:
            on.finish(step)
            on.finish(replace(step, namespace="uncond"))
    for name, expected in alone.curves(0).items():
        assert torch.equal(probe.curves(0)[name], expected)


def test_numbers_do_not_depend_on_the_blocks(monkeypatch):
    recorded, made = tape(passes(5)), policy(retain=WINDOW)
    expected = probed(made, recorded)[0].curves(0)
    for rows in (1, 3, 11):
        monkeypatch.setattr(module, "BLOCK", HEADS * 12 * rows)
        for name, values in probed(made, recorded)[0].curves(0).items():
            torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=1e-12)


def test_every_other_layer():
    recorded, made = tape(passes(4)), policy(retain=WINDOW)
    probe, _ = probed(made, recorded, stride=2)
    assert {layer for _, layer in probe._shadow} == {0}
    agree(probe, slow(recorded, in_window), layers=[0])


def test_watching_changes_nothing():
    made = policy(retain=WINDOW, select={"part": "top-attention", "budget": "2f"})
    recorded = tape(passes(5))
    on = [session(made, watch=watch) for watch in (None, AttentionProbe([0, 1]))]
    plain, watched = (play(one, recorded) for one in on)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert on[0].costs == on[1].costs


@pytest.mark.parametrize("name", ["full", "sink-window@4f"])
def test_a_rollout_of_the_embedded_model(panorama, name):
    """The last step; who is told of every pass comes to the same means."""
    config = panorama.network.config
    last = len(config.timesteps) - 1
    told = {}

    def tell(lse_read, lse_full, out, out_full, layer, step, chunk):
        mass, error = retained_mass(lse_read, lse_full), output_error(out, out_full)
        told.setdefault((layer, step, chunk), []).append(torch.stack([mass, error]))

    probe = AttentionProbe([last], tell=tell)
    rollout(panorama, preset(name), "dusk fast n10 left", 12, decode=False, watch=probe)
    assert {step for _, step, _ in told} == {last}
    curves, heads = probe.curves(0), probe.heads(0)
    found = torch.stack(
        [
            torch.stack([torch.cat(told[i, last, j], -1).mean(-1) for j in range(4)], -1)
            for i in range(config.layers)
        ],
        1,
    )  # [2, layers, heads, chunks]
    for own, means in zip(("retained_mass", "attention_error"), found, strict=True):
        torch.testing.assert_close(means.mean(-1), heads[own], rtol=1e-12, atol=1e-12)
        per_chunk = curves[own].view(4, 3).mean(1)
        torch.testing.assert_close(means.mean((0, 1)), per_chunk, rtol=1e-12, atol=1e-12)
    if name == "full":
        assert (curves["retained_mass"] - 1).abs().max() <= 1e-6
        assert curves["attention_error"].max() <= 1e-5
    else:
        assert (curves["retained_mass"][6:] < 0.99).all()
        assert (curves["attention_error"][6:] > 0.01).all()


def test_what_cannot_be_measured_is_refused():
    for wrong in ({"steps": []}, {"steps": [-1]}, {"tokens": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match="measures nothing"):
            AttentionProbe(**{"steps": [1]} | wrong)
    recorded = tape(passes(2))
    probe, _ = probed(policy(), recorded, steps=(7,))
    with pytest.raises(ValueError, match=r"No pass of sample 0 was measured at steps \[7\]"):
        probe.curves(0)
    probe, _ = probed(policy(), recorded)
    with pytest.raises(ValueError, match="No pass of sample 1"):
        probe.heads(1)
    with pytest.raises(ValueError, match=r"has seen 16 rows .* 0 frames of 4 are past"):
        play(session(policy(), watch=probe), recorded)
