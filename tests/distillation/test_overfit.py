"""Students and losses together: what is shown often enough is learned by heart."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from random_lists import random_lists, weighted_mean

from lightning_kv.distillation.judging import ListMetric
from lightning_kv.distillation.lists import column_moments
from lightning_kv.distillation.losses import cut_aware, listwise, output_loss
from lightning_kv.policies.scorer.students import make_student

BUDGETS = (2, 4, 6)


def taught(kind, lists, steps, loss):
    torch.manual_seed(0)
    width = lists.features.shape[-1], lists.context.shape[-1]
    made = make_student(kind, features=width[0], context=width[1], layers=3, heads=4,
                        prior=[1.0] + [0.0] * (width[0] - 1))  # fmt: skip
    made.standardise_by(*column_moments(lists))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(1)
    for step in range(steps):
        k = torch.randint(1, lists.places, (len(lists),), generator=rng)
        scores = scores_of(made, lists)
        optimizer.zero_grad()
        weighted_mean(loss(scores, lists, k, step / steps), lists.weight).backward()
        optimizer.step()
        schedule.step()
    return made.eval()


def scores_of(made, lists):
    return made(lists.features, lists.context, lists.layer, lists.head, lists.candidate)


def judged(scores, lists, **given):
    metric = ListMetric(BUDGETS, layers=3, heads=4, **given)
    metric.update(scores.detach(), lists)
    return metric.compute()


@pytest.mark.parametrize("kind", ["mlp", "set"])
def test_a_few_lists_are_learned_by_heart(kind):
    lists, _ = random_lists(count=32, places=12, features=24, context=4, full=True)
    made = taught(
        kind,
        lists,
        400,
        lambda scores, x, k, _: listwise(scores, x, 2.0) + 0.5 * cut_aware(scores, x, k),
    )
    found = judged(scores_of(made, lists), lists)
    for k in BUDGETS:
        assert found[f"regret@{k}"] < 0.01, found


def test_outputs_alone_teach_to_keep_them():
    lists, attention = random_lists(count=32, places=9, features=24, context=4, full=True, seed=1)
    lists = replace(lists, target=torch.full_like(lists.target, torch.nan))
    made = taught(
        "mlp", lists, 400, lambda scores, x, k, done: output_loss(scores, x, k, 0.1**done)
    )
    lists = replace(lists, target=attention.greedy(lists.candidate))
    before = judged(lists.features[..., 0], lists, outputs=True)  # as the prior ranks
    after = judged(scores_of(made, lists), lists, outputs=True)
    for k in BUDGETS:
        assert after[f"output_regret@{k}"] < 0.35 < 0.5 < before[f"output_regret@{k}"]
