"""Records of random lists in which one feature tells what frames are worth, as rounds have them."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distillation"))
from random_lists import random_lists

from lightning_kv.data.shards import PromptSample
from lightning_kv.distillation.clips import ClipLists
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES, feature_hash
from lightning_kv.policies.scorer.students import make_student
from lightning_kv.tasks.distillation.records import ListDirectory

TOLD = list(FEATURES).index("novelty")
MADE = {"layers": 3, "heads": 4, "feature_hash": feature_hash(tuple(FEATURES)), "round": 0}


def clip_lists(seed, count=40):
    """Lists of two candidates or more; where a frame is novel it is worth more."""
    lists, _ = random_lists(count, 7, features=len(FEATURES), context=len(CONTEXT), seed=seed)
    lists = lists.select(lists.candidate.sum(-1) >= 2)
    worth = lists.features[..., TOLD].exp() * lists.candidate
    return replace(lists, target=worth, clip=torch.zeros_like(lists.clip))


def made_rounds(folder, rounds=2, clips=4, held=2, made=MADE):
    """Folders of rounds."""
    found = []
    for turn in range(rounds):
        run = ListDirectory(folder / f"round-{turn}", made | {"round": turn})
        run.open("mark", {})
        for n in range(clips + held):
            lists = clip_lists(100 * turn + n)
            run.write(ClipLists(f"p{n}", f"p{n}", n >= clips, lists, 9, 6), sample(n))
        found.append(run.path)
    return found


def sample(n):
    return PromptSample(f"p{n}", f"prompt {n}", n, None)


def fresh(kind="mlp", features=tuple(FEATURES)):
    """An untrained scorer that begins with a feature that tells nothing."""
    torch.manual_seed(0)
    student = make_student(
        kind,
        features=len(features),
        context=len(CONTEXT),
        layers=3,
        heads=4,
        prior=[1.0] + [0.0] * (len(features) - 1),
    )
    return Scorer(student.eval().requires_grad_(False), tuple(features))
