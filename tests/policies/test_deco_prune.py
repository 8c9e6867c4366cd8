"""DeCoPrune against plain Python: what could be foreseen goes, two chunks later."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_kv import preset, rollout
from lightning_kv.cache.decisions import Event
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.samplers import few_step
from lightning_kv.policies.budgets import part_of
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    held_rows,
    random_tape,
    rolling,
)


class DecoScript(Script):
    """The method once more: reads estimates and latents off the tape, one cell at a time."""

    def __init__(self, tape, gamma=0.1, step=None, local=1, room=None):
        self.tape, self.gamma, self.step, self.local = tape, gamma, step, local
        self.room, self.dropped = room, 0
        self.error = {}
        for namespace in {entry.step.namespace for entry in tape.entries}:
            for sample in range(tape.batch):
                self.record(namespace, sample)

    def record(self, namespace, sample):
        """The error of every token of chunks that can lose some, by frame and place."""
        grid, seen = self.tape.geometry.grid, {}
        for entry in self.tape.entries:
            if entry.step.namespace != namespace:
                continue
            if entry.step.phase == "denoise":
                for i, frame in enumerate(entry.step.frames):
                    seen.setdefault(frame, []).append(entry.x0[sample, i])
            for frame in entry.step.final if entry.step.chunk else ():
                if frame not in seen:
                    continue
                last = entry.x0[sample, entry.step.frames.index(frame)]
                count, index = len(seen[frame]), self.step
                if index is None:
                    index = max(0, min(count // 2, count - 2))
                guess = seen[frame][min(index, len(seen[frame]) - 1)]
                high, wide = (n // m for n, m in zip(last.shape[1:], grid, strict=True))
                for place in range(grid[0] * grid[1]):
                    row, column = divmod(place, grid[1])
                    total = [
                        float(guess[c, row * high + y, column * wide + x])
                        - float(last[c, row * high + y, column * wide + x])
                        for c in range(len(last))
                        for y in range(high)
                        for x in range(wide)
                    ]
                    mean = sum(x * x for x in total) / len(total)
                    self.error[namespace, sample, frame, place] = mean

    def of(self, stream, row):
        key = stream.namespace, stream.sample, row.frame, row.place
        error = self.error.get(key, math.inf)
        return error if math.isfinite(error) else math.inf

    def closing(self, stream, step, q):
        ends = {e.step.chunk: e.step.final[-1] for e in self.tape.entries if e.step.final}
        last = step.chunk + 1 - 2 * self.local - 1
        if self.room is None and last >= 1:
            before = len(stream.rows)
            stream.rows = [
                row
                for row in stream.rows
                if row.frame > ends[last] or self.of(stream, row) > self.gamma
            ]
            self.dropped += before - len(stream.rows)

    def commit(self, stream, step):
        if self.room is None:
            return
        new = [row for row in stream.rows if row.frame in step.final]
        old = [row for row in stream.rows if row.frame not in step.final]
        old.sort(key=lambda row: (-self.of(stream, row), row.frame, row.place))
        kept = {(r.frame, r.place) for r in new + old[: max(0, self.room - len(new))]}
        self.dropped += len(stream.rows) - len(kept)
        stream.rows = [row for row in stream.rows if (row.frame, row.place) in kept]


def deco(**settings):
    return policy_from_dict({"name": "x", "retain": {"part": "deco-prune", **settings}})


def cells(tape, high, wide):
    """The same tape with latents of several cells for each token, and a number that is none."""
    entries = []
    for entry in tape.entries:
        x0 = entry.x0.repeat_interleave(high, 3).repeat_interleave(wide, 4)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(len(entries)))
        entries.append(replace(entry, x0=x0 + noise))
    entries[10].x0[0, 0, 0, 0, 0] = torch.nan
    return replace(tape, entries=tuple(entries))


# Steps, geometry, settings of the part, those of the twin.
CASES = {
    "with a budget": (
        chunked([3] * 14, noisy=3),
        {"grid": (1, 2), "batch": 2},
        {"budget": "6f"},
        {"room": 12},
    ),
    "three frames": (
        chunked([3] * 14, noisy=3),
        {"grid": (1, 3), "batch": 2},
        {"gamma": 2.0},
        {"gamma": 2.0},
    ),
    "single frames, a step by number": (
        chunked([1] * 14, noisy=4),
        {"grid": (2, 3), "batch": 2},
        {"gamma": 1.0, "probe": 2},
        {"gamma": 1.0, "step": 2},
    ),
    "pairs, more chunks whole": (
        chunked([2] * 14, noisy=2, context=3),
        {"grid": (1, 5)},
        {"gamma": 1.5, "local": 2},
        {"gamma": 1.5, "local": 2},
    ),
    "fours, a short last chunk, the last step": (
        chunked([4] * 13 + [1], noisy=2),
        {"grid": (2, 2)},
        {"gamma": 3.0, "probe": 1},
        {"gamma": 3.0, "step": 1},
    ),
    "guided": (
        guided(chunked([2] * 14, noisy=2)),
        {"grid": (1, 3)},
        {"gamma": 1.0},
        {"gamma": 1.0},
    ),
    "several chunks in flight": (
        rolling(2, 28, 3),
        {"grid": (1, 3)},
        {"gamma": 2.0},
        {"gamma": 2.0},
    ),
    "a prompt switch, tokens of a budget": (
        chunked([3] * 14, noisy=2),
        {"grid": (1, 3), "events": (Event("prompt_switch", 21, "b"),)},
        {"budget": "25t"},
        {"room": 25},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(8)
def test_every_decision_is_the_twins(case):
    """Over 14 chunks, with two cells of the latents for each token."""
    steps, world, settings, own = CASES[case]
    tape = cells(random_tape(steps, heads=2, dtype=torch.float64, **world), 1, 2)
    script = DecoScript(tape, **own)
    equal, total = compare_decisions(deco(**settings), script, tape, ("kept", "read"))
    assert equal == total >= 200
    assert script.dropped > 30


@pytest.mark.parametrize("case", ["with a budget", "guided"])
@pytest.mark.thinned(2)
def test_outputs_and_rows_are_the_twins(case):
    steps, world, settings, own = CASES[case]
    steps = [step for step in steps if step.chunk < 7]

    class Noted(DecoScript):
        def fresh(self, row):
            return row.clone(columns={"error": None})

        def commit(self, stream, step):
            for row in stream.rows:
                row.columns["error"] = min(self.of(stream, row), 2.0**100)
            super().commit(stream, step)

    tape = cells(random_tape(steps, **world | {"batch": 1, "heads": 2}), 2, 1)
    assert_same_as_twin(deco(**settings), Noted(tape, **own), tape)


def test_the_worked_example():
    """Chunks of 3: those before the newest two have lost tokens, the first never does."""
    tape = random_tape(chunked([3] * 6, noisy=4), layers=2, heads=2)
    script, seen = DecoScript(tape, gamma=2.0), {}

    def look(view):
        if view.step.phase == "denoise":
            seen[view.step.chunk] = view.rows_per_frame[0].tolist(), view.frames

    left = {
        f: sum(script.error["cond", 0, f, p] > 2 for p in range(6)) for f in range(3, 18)
    } | dict.fromkeys(range(3), 6)
    tape.play(deco(gamma=2.0), watch=look)
    for chunk, (rows, frames) in seen.items():
        pruned = range(3, 3 * (chunk - 2))
        wanted = {f: left[f] if f in pruned else 6 for f in range(3 * chunk)}
        assert dict(zip(frames, rows, strict=True)) == {f: n for f, n in wanted.items() if n}


def test_ages_are_squeezed_at_every_chunk():
    """From the spec: of 240 frames the first appears 17 back, one of age 124 at 12.5."""
    part = preset("deco-prune").positions
    found, world = {}, {"layers": 1, "heads": 1, "grid": (1, 1), "train_horizon": 21}
    tape = random_tape(chunked([3] * 14, noisy=1), **world)

    def look(view):
        found[view.step.start] = view.lag[0, 0].tolist()

    tape.play(policy_from_dict({"name": "x", "positions": "virtual-age"}), watch=look)
    assert found[6] == [6, 5, 4, 3, 2, 1]
    assert found[15] == list(range(15, 0, -1))
    ages = [39 - f for f in range(39)]
    wanted = [a if a <= 8 else 8 + (a - 8) * 9 / 31 for a in ages]
    assert found[39] == pytest.approx(wanted, abs=1e-5)
    near, far = part_of(part.near, 21), part_of(part.far, 21)
    assert (near, far) == (8, 17) and near + (124 - near) * (far - near) / (240 - near) == 12.5


def test_given_frames_are_judged_by_a_pass_that_is_thrown_away(panorama):
    """Its estimate is what the model makes of the given frames, noised, with those before them."""
    context, seen = torch.randn(1, 9, 16, 4, 4), []
    made = rollout(
        panorama,
        deco(gamma=1e29),
        "dusk fast n10 left",
        18,
        context=context,
        decode=False,
        progress=lambda _, session: seen.append(session.samples[0].stores["cond"][0].frames),
    )
    # chunk 1 goes at the commit of chunk 3, chunk 2 at that of chunk 4
    assert seen[3] == (0, 1, 2, *range(6, 12)) and seen[4] == (0, 1, 2, *range(9, 15))
    plain = rollout(
        panorama, preset("full"), "dusk fast n10 left", 18, context=context, decode=False
    )
    assert torch.equal(made.latents[:, :12], plain.latents[:, :12])


@pytest.mark.parametrize("wrong", [{"gamma": -1}, {"probe": -0.5}, {"probe": 1.7}, {"local": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"out of range|neither steps nor a share of the denois"):
        deco(**wrong)


def test_a_step_that_the_sampler_has_not(panorama):
    """Known before the first chunk of a continuation, and once the first chunk is final."""
    steps, about = len(panorama.network.config.timesteps), {"decode": False}
    made, text = deco(probe=steps), "dusk fast n10 left"
    with pytest.raises(ValueError, match=rf"probe={steps} .* beyond the {steps} .* Use 0 to"):
        rollout(panorama, made, text, 9, **about)
    context = rollout(panorama, preset("full"), text, 6, **about).latents
    with pytest.raises(ValueError, match=rf"beyond the {steps} denoising steps"):
        rollout(panorama, made, text, 12, context=context, **about)


@pytest.mark.parametrize("more", [{}, {"budget": "6f"}])
@pytest.mark.parametrize(
    ("lost", "said"), [("on_prediction", "no clean estimates"), ("on_final", "no final latents")]
)
@pytest.mark.parametrize("steps", [chunked([3] * 5), rolling(2, 14, 3)], ids=["chunks", "rolling"])
def test_a_session_that_nobody_shows_latents(monkeypatch, steps, lost, said, more):
    """All would be kept, or with a budget the oldest, and nobody would know."""
    monkeypatch.setattr(CacheSession, lost, lambda *_: None)
    with pytest.raises(ValueError, match=rf"'deco-prune' .* shown {said} of frame") as error:
        random_tape(steps).play(deco(**more))
    assert "Use rollout(...), or call session.on_prediction(...)" in str(error.value)


def test_latents_that_no_patch_divides():
    tape = cells(random_tape(chunked([3] * 5), grid=(2, 2)), 1, 1)
    odd = replace(tape, entries=tuple(replace(e, x0=e.x0[..., :1]) for e in tape.entries))
    with pytest.raises(ValueError, match="multiples"):
        odd.play(deco())


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "works"), [(1, False), (2, True), (4, True)])
def test_the_estimate_lies_before_the_last_step(panorama, steps, works):
    """What the last step estimates is final: nothing would be unforeseen."""
    levels, text = panorama.network.config.timesteps[:steps], "dusk fast n10 left"

    def sample(plan, timesteps, *more):
        return few_step(plan, levels, *more)

    def run():
        return rollout(panorama, deco(gamma=0.0), text, 24, sampler=sample, decode=False)

    if works:
        table = run().session.samples[0].stores["cond"][0].table
        assert len({int(r.frame) for r in held_rows(table, 0)}) == 24
    else:
        with pytest.raises(ValueError, match="final latents as an estimate"):
            run()
