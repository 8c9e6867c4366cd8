"""What frames are worth: against loops over softmaxes of single queries, and a real rollout."""

import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attended import CHUNK, HEADS, WEIGHTS, Attended, place

from lightning_kv import preset, rollout
from lightning_kv.cache.decisions import Retention
from lightning_kv.distillation.labels import (
    TARGETS,
    Decision,
    Teacher,
    drawn,
    falling,
    output_problems,
    targets,
)
from lightning_kv.models.samplers import stable_seed
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.hindsight import Place


def guarded(frames, *stay):
    return torch.tensor([[frame in stay for frame in frames]])


def ranked(worth, frames):
    """Frames with any worth, best first."""
    order = sorted(range(len(frames)), key=lambda i: -worth[i])
    return [frames[i] for i in order if worth[i] > 0]


def greedy(world, chunks, layer, head, frames, guard, made, discount):
    """Frames in the order in which they help most, and the loss before and after each."""
    kept, order = set(guard), []
    losses = [world.loss(chunks, layer, head, kept, made, discount)]
    while left := [f for f in frames if f not in kept]:
        each = {f: world.loss(chunks, layer, head, kept | {f}, made, discount) for f in left}
        order.append(min(each, key=each.get))
        kept.add(order[-1])
        losses.append(each[order[-1]])
    return order, losses


def pooled(values):
    """Pool adjacent violators, one after the other."""
    blocks = []
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return [value for value, count in blocks for _ in range(count)]


# -- what a frame is worth ---------------------------------------------------------------------


@pytest.mark.parametrize("discount", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("horizon", [None, 1, 2, 9])
def test_masses_are_means_and_maxima_over_chunks_that_are_visible(horizon, discount):
    world = Attended(1, chunks=5)
    for chunk in range(4):
        frames = [f for f in range((chunk + 1) * CHUNK) if f != 1]
        stay = (frames[-1],)
        decision = Decision(chunk, (place(frames, frames[-1] + 1),), (guarded(frames, *stay),))
        later = [c for c in range(chunk + 1, 5) if horizon is None or c <= chunk + horizon]
        for head in range(HEADS):
            mass = {c: world.mass(c, 0, head) for c in [chunk, *later]}
            total = sum(discount**i for i in range(len(later)))
            mean = [sum(discount**i * mass[c][f] for i, c in enumerate(later)) for f in frames]
            most = [max(mass[c][f] for c in later) for f in frames]
            scale = torch.tensor(1001.0, dtype=torch.float64).log()
            expected = {
                "mass-now": [mass[chunk][f] for f in frames],
                "mass-future": [m / total for m in mean],
                "max-future": [float(torch.tensor(1 + 1000 * m).log() / scale) for m in most],
            }
            for target, line in expected.items():
                teacher = Teacher(target, horizon=horizon, discount=discount)
                (found,) = targets(teacher, world.tables, decision)
                assert found.dtype == torch.float32 and found.shape == (HEADS, len(frames))
                line = [0 if f in stay else x for f, x in zip(frames, line, strict=True)]
                assert found[head].tolist() == pytest.approx(line, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_next_use_ranks_by_the_first_chunk_that_looks_then_by_mass(seed):
    world, threshold = Attended(seed, chunks=6), 0.12
    teacher = Teacher("next-use", horizon=None, threshold=threshold)
    frames, later = range(4), range(2, 6)
    decision = Decision(1, (place(frames, 4),), (guarded(frames),))
    (found,) = targets(teacher, world.tables, decision)
    for head in range(HEADS):
        mass = [world.mass(c, 0, head) for c in later]

        def key(f, mass=mass):
            uses = [ahead for ahead, line in enumerate(mass) if line[f] > threshold]
            return (min(uses, default=99), -sum(0.8**i * line[f] for i, line in enumerate(mass)))

        assert ranked(found[head].tolist(), frames) == sorted(frames, key=key)
        for f, worth in zip(frames, found[head].tolist(), strict=True):
            first = key(f)[0]
            assert worth < 1 / (first or 1) or not first  # below what is used a chunk earlier
            assert first == 99 or worth >= 1 / (first + 1)


@pytest.mark.parametrize("seed", range(8))
def test_outputs_are_worth_the_gains_of_a_slow_greedy_search(seed):
    """The order is the search's, over all sizes; worths add up to what it gains."""
    world = Attended(seed, chunks=4, loud=3.0)
    chunk, horizon, discount = ((1, 2, 0.8), (2, None, 1.0), (1, 1, 0.5))[seed % 3]
    made = (chunk + 1) * CHUNK
    frames = [f for f in range(made) if f != seed % 2]
    present = torch.tensor([[True] * len(frames)] * HEADS)
    present[1, 1] = False
    here = replace(place(frames, made), present=present)
    decision = Decision(chunk, (here,), (guarded(frames, made - 1),))
    teacher = Teacher("out-future", horizon=horizon, discount=discount)
    (found,) = targets(teacher, world.tables, decision)
    later = teacher.coming(world.clip, chunk)
    for head in range(HEADS):
        own = [f for f, yes in zip(frames, present[head].tolist(), strict=True) if yes]
        order, losses = greedy(world, later, 0, head, own, {made - 1}, made, discount)
        gains = pooled([(a - b) / losses[0] for a, b in pairwise(losses)])
        gained = [f for f, gain in zip(order, gains, strict=True) if gain > 0]
        worth = dict(zip(frames, found[head].tolist(), strict=True))
        assert ranked(found[head].tolist(), frames)[: len(gained)] == gained
        for f, gain in zip(gained, gains, strict=False):
            assert worth[f] == pytest.approx(gain, rel=2e-3, abs=1e-6)
        assert {f for f, x in worth.items() if x > 0} == {*own} - {made - 1}
        assert len({*worth.values()} - {0.0}) == len(own) - 1, "the order is total"


def test_frames_that_do_harm_come_last_by_mass():
    """What pulled the other way is gone: without those that it made up for, outputs are nearer."""
    world = Attended(3, chunks=4, loud=0.5)
    world.values *= 0.05
    world.values[..., 0] = 0
    for frame, push in enumerate((3.0, -1.0, -0.5, 0.5)):  # the first of them was dropped
        world.values[:, :, frame, :, 0] += push
    frames, guard = range(1, 6), guarded(range(1, 6), 5)
    decision = Decision(2, (place(frames, 6),), (guard,))
    found, mass = (
        targets(Teacher(target, horizon=None), world.tables, decision)[0]
        for target in ("out-future", "mass-future")
    )
    for head in range(HEADS):
        order, losses = greedy(world, [3], 0, head, frames, {5}, 6, 0.8)
        gains = pooled([(a - b) / losses[0] for a, b in pairwise(losses)])
        best = [f for f, gain in zip(order, gains, strict=True) if gain > 0]
        harm = sorted({*order} - {*best}, key=lambda f: -mass[head, f - 1])
        assert best[0] == 3 and {1, 2} <= {*harm}
        assert ranked(found[head].tolist(), frames) == best + harm


@pytest.mark.parametrize("seed", range(5))
def test_falling_sequences_are_those_of_pooled_neighbours(seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 9, generator=rng).double() - torch.arange(9) / 6
    mine = falling(values)
    for line, own in zip(values.tolist(), mine.tolist(), strict=True):
        assert own == pytest.approx(pooled(line))
    assert bool((mine.diff(dim=-1) <= 1e-15).all())
    torch.testing.assert_close(mine.sum(-1), values.sum(-1))


# -- near the end of a clip --------------------------------------------------------------------


def test_a_list_counts_for_the_share_of_its_horizon_that_is_visible():
    clip = Attended(chunks=8).clip
    weights = [Teacher(horizon=3).weight(clip, chunk) for chunk in range(8)]
    assert weights == pytest.approx([1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0])
    assert [Teacher(horizon=20).weight(clip, c) for c in (0, 5, 7)] == pytest.approx([0.35, 0.1, 0])
    assert [Teacher(horizon=None).weight(clip, c) for c in (0, 6, 7)] == [1, 1, 0]
    assert Teacher("mass-now").weight(clip, 7) == 1
    assert Teacher(horizon=2).coming(clip, 3) == range(4, 6)


@pytest.mark.parametrize("target", TARGETS)
def test_behind_the_last_chunk_nothing_is_worth_anything(target):
    world = Attended(chunks=3)
    frames = range(6)
    decision = Decision(2, (place(frames, 6),), (guarded(frames, 5),))
    (found,) = targets(Teacher(target), world.tables, decision)
    assert found.shape == (HEADS, 6) and bool(found.any()) == (target == "mass-now")
    (problem,) = output_problems(Teacher(target), world.tables["outputs"], decision, 3, "a")
    assert problem.share.shape == (HEADS, 3, 7) and problem.gram.shape == (HEADS, 3, 7, 7)
    assert not problem.gram.any() and not problem.query.any()
    assert problem.share.sum(-1).eq(1).all() and problem.share[..., -1].eq(1).all()


# -- queries that are drawn --------------------------------------------------------------------


def test_draws_are_spread_and_in_proportion():
    weight = torch.tensor([0.5, 0.0, 3.0, 1.0, 0.25, 2.0])
    expected, total = 4 * weight.double() / weight.sum(), torch.zeros(6).double()
    for seed in range(4000):
        found = drawn(weight, 4, stable_seed("a", seed))
        assert found.shape == (4,) and bool((found.diff() >= 0).all())
        count = torch.bincount(found, minlength=6)
        assert bool(((count - expected).abs() < 1).all())
        total += count
    torch.testing.assert_close(total / 4000, expected, atol=0.03, rtol=0)
    assert drawn(torch.tensor([0.0, 1.0]), 2, 0).tolist() == [1, 1], "what counts nothing never is"


def test_draws_are_those_of_their_clip_chunk_and_layer():
    world = Attended(chunks=5, layers=2)
    table, teacher = world.tables["outputs"], Teacher(horizon=None)

    def found(key, chunk=1, layer=0):
        """Queries without a candidate: what they are read in any case tells them apart."""
        here = Decision(chunk, (place((0,), 2, layer),), (guarded((0,), 0),))
        return output_problems(teacher, table, here, 3, key)[0].share

    assert torch.equal(found("a"), found("a"))
    assert len({tuple(found(key).flatten().tolist()) for key in "abcdefgh"}) > 4
    alike = Decision(1, (place((0,), 2), place((0,), 2, 1)), (guarded((0,), 0),) * 2)
    for own in table.outputs.values():  # every query of a place can be told by its number
        own.share[:] = torch.arange(1.0, 5).view(1, -1, 1)
    first, other = output_problems(teacher, table, alike, 3, "a")
    assert not torch.equal(first.share, other.share)


@pytest.mark.parametrize("seed", range(4))
def test_errors_of_sets_are_those_of_a_softmax_over_their_rows(seed):
    """Heads have other candidates; what they have dropped is gone, what is newer is read."""
    world, count, made = Attended(seed, chunks=5, loud=1.5), 5, 6
    rng = torch.Generator().manual_seed(seed)
    frames, discount = (0, 2, 3, 5), 0.7
    present = torch.tensor([[True, True, True, True], [True, False, True, True]])
    guard = torch.tensor([[False, False, False, True], [True, True, False, True]])
    here = replace(place(frames, made), present=present)
    (problem,) = output_problems(
        Teacher(horizon=None, discount=discount),
        world.tables["outputs"],
        Decision(2, (here,), (guard,)),
        count,
        "k",
    )
    weight = torch.tensor([discount**i * w / sum(WEIGHTS) for i in range(2) for w in WEIGHTS])
    asked = drawn(weight, count, stable_seed("k", "cond", 2, 0)).tolist()
    assert problem.query.sum(-1).tolist() == pytest.approx([1.0] * HEADS)
    for _ in range(8):
        kept = torch.rand(HEADS, 4, generator=rng) < 0.5
        mask = torch.cat([kept, torch.ones(HEADS, 1, dtype=torch.bool)], 1).double()
        size = torch.einsum("hu,hruv,hv->hr", mask, problem.gram.double(), mask)
        share = torch.einsum("hu,hru->hr", mask, problem.share.double())
        for head in range(HEADS):
            own = [
                f
                for f, yes, there, stays in zip(
                    frames, kept[head], present[head], guard[head], strict=True
                )
                if there and (yes or stays)
            ]
            for r, index in enumerate(asked):
                chunk, query = 3 + index // len(WEIGHTS), index % len(WEIGHTS)
                seen = {*own, *range(made, (chunk + 1) * CHUNK)}
                error = world.error(chunk, 0, head, query, seen)
                found = float(size[head, r] / share[head, r] ** 2)
                assert found == pytest.approx(error, rel=1e-4, abs=1e-6)
    off = ~present | guard
    assert not problem.share[:, :, :-1].transpose(1, 2)[off].any()
    assert not problem.gram[:, :, :-1].transpose(1, 2)[off].any()


# -- sets --------------------------------------------------------------------------------------

PROMPT, RECORD = "dusk fast n13 left", {"mass": {}, "outputs": {"queries": 4}}


@pytest.fixture(scope="module")
def recorded(panorama):
    """Tables of a rollout of the full cache of the embedded model."""
    made = rollout(panorama, preset("full"), PROMPT, 36, record=RECORD, decode=False)
    return {name: own[0] for name, own in made.tables.items()}


def losses_of(table, layer, frames, made, chunks, kept):
    """Of sets ``[..., H, U]`` of some frames, from shares and pulls as they were recorded."""
    total = 0.0
    for ahead, chunk in enumerate(chunks):
        own = table.outputs["cond", chunk, layer]
        column = [frames.index(f) if f in frames else len(frames) + (f < made) for f in own.frames]
        always = torch.ones(*kept.shape[:-1], 1).double()
        there = torch.cat([kept.double(), always, 0 * always], -1)[..., column]
        share = torch.einsum("...hu,heu->...he", there, own.share.double())
        pull = torch.einsum("...hu,heud->...hed", there, own.pull.double())
        error = (pull / share.unsqueeze(-1)).square().sum(-1)
        weight = own.weight.double() / own.weight.sum()
        total = total + 0.8**ahead * (error * weight).sum(-1)
    return total


def lists(chunks, count, seed=0):
    """Decisions of the embedded model: the newest chunk is guarded, and there are some others."""
    rng = torch.Generator().manual_seed(seed)
    for chunk in chunks:
        made = 3 * (chunk + 1)
        for layer in range(6):
            old = sorted(torch.randperm(made - 3, generator=rng)[:count].tolist())
            frames = [*old, *range(made - 3, made)]
            guard = guarded(frames, *frames[-3:])
            yield layer, frames, guard, Decision(chunk, (place(frames, made, layer),), (guard,))


def best_of(worth, size):
    """The places with the most worth, bool ``[H, U]``."""
    order = worth.argsort(-1, descending=True)[:, :size]
    return torch.zeros(worth.shape, dtype=torch.bool).scatter(1, order, True)


def test_sets_by_outputs_are_better_than_sets_by_mass(recorded):
    """With one frame always. With more, a greedy search may be worse now and then: 1 in 200."""
    worse, sets, shares = 0, 0, []
    for layer, frames, guard, decision in lists(range(3, 11), 9):
        made, chunks = (
            3 * (decision.chunk + 1),
            Teacher().coming(recorded["mass"].clip, decision.chunk),
        )
        about = (recorded["outputs"], layer, frames, made, chunks)
        worths = [
            targets(Teacher(name), recorded, decision)[0] for name in ("out-future", "mass-future")
        ]
        for size in range(1, len(frames) - 3):
            ours, theirs = (losses_of(*about, best_of(own, size) | guard) for own in worths)
            lost = ours > theirs * (1 + 1e-4)
            assert size > 1 or not lost.any()
            worse, sets = worse + int(lost.sum()), sets + len(lost)
            shares.append(ours / theirs)
    assert sets > 1000 and worse <= 0.01 * sets
    assert float(torch.cat(shares).log().mean().exp()) < 0.92


def test_sets_by_outputs_are_close_to_the_best_there_are(recorded):
    """All sets of up to eight frames are tried. Losses in units of that without any of them."""
    excess = []
    for layer, frames, guard, decision in lists(range(3, 11), 8, seed=1):
        made, chunks = (
            3 * (decision.chunk + 1),
            Teacher().coming(recorded["mass"].clip, decision.chunk),
        )
        about = (recorded["outputs"], layer, frames, made, chunks)
        (worth,) = targets(Teacher(), recorded, decision)
        count = len(frames) - 3
        every = torch.arange(2**count).unsqueeze(1).bitwise_and(2 ** torch.arange(count)) > 0
        every = torch.cat([every, torch.ones(2**count, 3, dtype=torch.bool)], 1)
        loss = losses_of(*about, every.unsqueeze(1).expand(-1, len(worth), -1))
        for size in range(1, count):
            ours = losses_of(*about, best_of(worth, size) | guard)
            excess.append((ours - loss[every.sum(1) == size + 3].amin(0)) / loss[0])
    excess = torch.cat(excess)
    assert len(excess) > 1000 and float(excess.min()) > -1e-12
    assert float((excess < 1e-6).double().mean()) > 0.95, "exactly the best set"
    assert float(excess.max()) < 0.05 and float(excess.mean()) < 1e-3


# -- a real run --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Keeps(RetainPart):
    """At one commit, in one layer, each head keeps what is said."""

    chunk: int = 0
    layer: int = 0
    kept: torch.Tensor | None = None

    def commit(self, views, state):
        answers = [None] * len(views)
        if views[0].step.chunk == self.chunk:
            rows = views[self.layer].rows_of(self.kept)
            answers[self.layer] = Retention(keep=rows)
        return answers


def first_outputs(model, policy, chunk, layer):
    """Of the first pass of a chunk in a layer, ``[H, T, D]``; and tables of the rollout."""
    found = []

    def watch(view):
        if (view.step.chunk, view.step.step, view.step.phase) == (chunk, 0, "denoise"):
            found.append(view.output.double())

    about = {"record": RECORD, "watch": watch, "decode": False}
    made = rollout(model, policy, PROMPT, 3 * (chunk + 1), **about)
    return found[layer], {name: own[0] for name, own in made.tables.items()}


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_the_error_of_a_set_is_that_of_a_real_run_with_this_memory(panorama, layer):
    """Up to the layer in which something is gone, the next pass is that of the full cache."""
    chunk, made = 3, 12
    dense, tables = first_outputs(panorama, preset("full"), chunk + 1, layer)
    tables["outputs"].outputs["cond", chunk + 1, layer].weight[4:] = 0  # the first pass alone
    queries = [0, 12, 24, 36]
    rng, frames = torch.Generator().manual_seed(layer), range(made)
    for _ in range(2):
        guard = guarded(frames, 9, 10, 11)
        present = (torch.rand(4, made, generator=rng) < 0.8) | guard
        here = Place("cond", layer, tuple(frames), present, made)
        kept = (torch.rand(4, made, generator=rng) < 0.5) & present | guard
        decision = Decision(chunk, (here,), (guard,))
        (problem,) = output_problems(Teacher(horizon=1), tables["outputs"], decision, 4, "a")
        policy = replace(preset("full"), retain=Keeps(chunk=chunk, layer=layer, kept=kept))
        moved, _ = first_outputs(panorama, policy, chunk + 1, layer)
        expected = (moved - dense).square().sum(-1)[:, queries]
        mask = torch.cat([kept & ~guard, torch.ones(4, 1, dtype=torch.bool)], 1).double()
        size = torch.einsum("hu,hruv,hv->hr", mask, problem.gram.double(), mask)
        share = torch.einsum("hu,hru->hr", mask, problem.share.double())
        assert float(expected.median()) > 1e-5
        torch.testing.assert_close(size / share.square(), expected, rtol=2e-3, atol=1e-6)


# -- what is refused ---------------------------------------------------------------------------


def test_tables_that_a_teacher_needs():
    assert Teacher("mass-future").needs == {"mass": {}}
    assert Teacher(queries=7).needs == {"mass": {}, "outputs": {"queries": 7}}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target": "mass"}, r"the target 'mass', which is unknown\. Use one of: mass-now, mass-f"),
        ({"horizon": 0}, r"horizon=0, out of range\. Use a horizon and queries of 1 or more"),
        ({"discount": 1.1, "queries": 0}, r"queries=0, discount=1.1, out of range"),
        ({"discount": float("nan")}, "discount=nan"),
        ({"horizon": "six", "queries": 1.5}, r"horizon=six, queries=1.5, out of range"),
        ({"discount": "much", "threshold": None}, "discount=much, threshold=None"),
        ({"threshold": 1.0}, "threshold=1.0"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Teacher(**settings)


def test_places_and_guards_that_do_not_fit_are_refused():
    here = place(range(4), 4)
    with pytest.raises(
        ValueError, match=r"chunk 1 have \[4, 4\] frames, and its guards \[4\]\. Gi"
    ):
        Decision(1, (here, here), (guarded(range(4), 3),))
    with pytest.raises(ValueError, match=r"have \[4\] frames, and its guards \[3\]"):
        Decision(1, (here,), (guarded(range(3), 2),))
