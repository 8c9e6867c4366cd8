"""A frame that is looked at in every fourth chunk: a student that was taught keeps it.

Nothing of the chunks between tells that it will be needed: recency drops it, and so does the last
softmax mass, which is lowest on this very frame.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from random_lists import weighted_mean

from lightning_kv.distillation.collect import Taught
from lightning_kv.distillation.labels import Teacher
from lightning_kv.distillation.lists import column_moments, concatenated
from lightning_kv.distillation.losses import cut_aware, listwise
from lightning_kv.distillation.samples import lists_of_clip
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import load_policy, policy_from_dict
from lightning_kv.policies.retain.oracle import Oracle
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.testing.candidate import play
from lightning_kv.testing.schedules import chunked
from lightning_kv.testing.tapes import FULL, random_tape

PERIOD, CHUNKS, BUDGET = 4, 14, "6f"
LAST = (CHUNKS - 1) // PERIOD * PERIOD  # chunk
STILL = 3  # a component that turns with time so slowly that it hardly does


def planted(seed):
    """A tape, and the frame of its first chunk that is looked at in every fourth chunk."""
    tape = random_tape(
        chunked((3,) * CHUNKS, 1), layers=1, heads=2, grid=(1, 4), gain=0.5, seed=seed
    )
    tokens, frame = tape.geometry.tokens, seed % 3
    for entry in tape.entries:
        step = entry.step
        for q, k, _ in entry.layers:
            q[..., STILL] = 8.0 if step.chunk % PERIOD == 0 else -8.0
            k[..., STILL] = 0.0
            if frame in step.frames:
                k[:, frame * tokens : (frame + 1) * tokens, :, STILL] = 2.0
    return tape, frame


def lists_of(seed, scorer):
    """What the scorer sees where the teacher decides, and what frames turn out to be worth."""
    tape, _ = planted(seed)
    teacher = Teacher("mass-future", horizon=None, discount=0.9)
    budget = load_policy(f"h2o@{BUDGET}").retain.budget
    part = Taught(budget=budget, scorer=scorer, teacher=Oracle(objective="mass"))
    policy = CachePolicy("taught", part, FULL.select, FULL.positions, FULL.precision)
    tape.play(policy)
    return lists_of_clip(part.watched, _single(tape, policy), teacher, f"clip {seed}", clip=seed)


def _single(tape, policy):
    return {name: own[0] for name, own in tape.tables(policy.needs).items()}


def taught(scorer, lists, steps=80):
    student = scorer.student.train().requires_grad_(True)
    torch.manual_seed(0)
    student.standardise_by(*column_moments(lists))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(steps):
        scores = scorer.scores(
            lists.features, lists.context, lists.layer, lists.head, lists.candidate
        )
        loss = listwise(scores, lists, 2.0) + 0.5 * cut_aware(scores, lists, lists.keep)
        optimizer.zero_grad()
        weighted_mean(loss, lists.weight).backward()
        optimizer.step()
    student.eval().requires_grad_(False)
    return scorer


def kept_for(policy, tape, frame):
    """After how many chunks each head holds the frame, until it is looked at for the last time."""
    found = {}
    for key, rows in play(policy, tape).decisions.kept.items():
        if key[4] < LAST and any(row[0] == frame for row in rows):
            found.setdefault(key[3], []).append(key[4])
    return [len(found.get(head, ())) for head in range(tape.geometry.heads)]


def by(scorer, path):
    scorer.save(path)
    retain = {"part": "distilled", "scorer": str(path), "budget": BUDGET}
    return policy_from_dict({"name": "mine", "retain": retain})


def test_a_frame_of_every_fourth_chunk_is_kept_by_a_student_that_was_taught(tmp_path):
    geometry = planted(0)[0].geometry
    fresh = Scorer.fresh("mlp", geometry, prior="recency")
    lists = concatenated([lists_of(seed, fresh) for seed in range(4)])
    student = by(taught(fresh, lists), tmp_path / "taught.safetensors")
    last = Scorer.fresh("mlp", geometry, prior="snap-kv")
    rivals = {
        "recency": load_policy(f"sliding-window@{BUDGET}"),
        "last mass": by(last, tmp_path / "last.safetensors"),
    }
    for seed in (100, 101, 102):  # worlds that it was not taught on
        tape, frame = planted(seed)
        assert kept_for(student, tape, frame) == [LAST] * 2
        for name, rival in rivals.items():
            assert max(kept_for(rival, tape, frame)) <= PERIOD, name
