"""Fit a student to lists: a LightningModule for any Trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_kv.distillation.baselines import BASELINES
from lightning_kv.distillation.judging import OWN, Cut, ListMetric, cuts_of
from lightning_kv.distillation.lists import Lists
from lightning_kv.distillation.losses import (
    cut_aware,
    listwise,
    output_loss,
    residual_penalty,
)
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.tasks.distillation.data import Batch, StatisticsData
from lightning_kv.tasks.options import DistillRecipe
from lightning_kv.tasks.training.module import Training, check_numbers

KEPT = (3, 6, 12)
"""Candidates that are kept, of the fixed budgets on which held-out lists are looked at."""
MONITOR = f"val/regret@{OWN}"
"""What says whether a student has become better: lower is."""
OUTPUT_MONITOR = f"val/output_regret@{OWN}"
"""The same where a student is taught on errors of outputs, and held-out lists have them."""


class PolicyDistiller(Training):
    """Teaches a student which frames a reference looks at later, by the lists of its records.

    Under a Trainer of your own: ``Trainer(...).fit(PolicyDistiller(scorer, recipe), datamodule=
    StatisticsData(folders, recipe.steps))``, with any logger, callbacks and number of processes.
    Held-out lists are looked at as ``val/MEASURE@k``, k candidates being kept, or ``own``: as many
    as the rollout kept; :meth:`monitor` says which of them decides. The first look also tells what
    rankings by hand reach, as ``baseline/NAME/MEASURE@k``.

    Args:
        scorer: What to begin with: untrained, or that of the round before.
        recipe: Everything else that the numbers depend on.
        kept: Fixed budgets of held-out lists.

    Raises:
        ValueError: The recipe cannot be followed.
    """

    advice: ClassVar[str] = (
        "give a lower learning rate (lr) or a longer warm-up (warmup) in the recipe"
    )

    scale: Tensor
    least: Tensor

    def __init__(
        self,
        scorer: Scorer,
        recipe: DistillRecipe | None = None,
        kept: Sequence[int] = KEPT,
    ) -> None:
        recipe = recipe or DistillRecipe()
        check_recipe(recipe)
        super().__init__(recipe.steps)
        self.recipe, self.scorer, self.kept = recipe, scorer, tuple(kept)
        every = list(FEATURES)
        self.columns = [every.index(name) for name in scorer.features]
        self.student = copy.deepcopy(scorer.student).train().requires_grad_(True)
        self.average = self.averaged(self.student)
        self.best = copy.deepcopy(self.average)
        self.register_buffer("scale", torch.zeros(()))  # of outputs, when they first counted
        self.register_buffer("least", torch.full((), math.inf))  # regret of the best
        self.metrics = nn.ModuleDict()
        self._cuts: dict[int, list[Cut]] = {}
        self._told = False  # what baselines reach

    def monitor(self, held: Lists | None) -> str:
        """Name of what says whether the student has become better on held-out lists."""
        outputs = held is not None and held.gram is not None and self.recipe.outputs
        return OUTPUT_MONITOR if outputs else MONITOR

    def setup(self, stage: str) -> None:
        """Columns are standardised by the lists to learn; a checkpoint brings its own.

        Raises:
            ValueError: The data are no lists.
        """
        data = self.trainer.datamodule
        if not isinstance(data, StatisticsData):
            raise ValueError(
                "A PolicyDistiller learns lists, and its Trainer was given "
                f"{'no data module' if data is None else type(data).__name__}. Call "
                "trainer.fit(module, datamodule=StatisticsData(folders, steps))."
            )
        if stage == "fit":
            moments = data.moments()
            for own in (self.student, self.average, self.best):
                own.standardise_by(*moments)
        self._cuts, self._told = {}, False
        names = ("student", *BASELINES)
        made = {name: self._metric(data.held_out.lists) for name in names}
        self.metrics = nn.ModuleDict(made)

    def _metric(self, held: Lists | None) -> ListMetric:
        settings = self.student.settings
        return ListMetric(
            (OWN, *self.kept),
            layers=settings["layers"],
            heads=settings["heads"],
            outputs=held is not None and held.gram is not None,
            distributed_available_fn=self._together,
        )

    def _together(self) -> bool:
        """Whether ranks of this Trainer share the lists: others may wait elsewhere meanwhile."""
        return self.trainer.world_size > 1

    # -- training ------------------------------------------------------------------------------

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a step."""
        recipe, lists = self.recipe, batch.lists
        prior, residual = self.student.parts(*self.given(lists))
        scores = prior + residual
        each = {
            "listwise": listwise(scores, lists, recipe.tau),
            "cut": cut_aware(scores, lists, batch.k),
            "penalty": residual_penalty(residual, lists.candidate),
        }
        found = {name: (own * lists.weight).sum() / batch.total for name, own in each.items()}
        loss = found["listwise"] + recipe.cut * found["cut"] + recipe.penalty * found["penalty"]
        late = (self.global_step / self.steps - recipe.first) / max(1e-9, 1 - recipe.first)
        if late >= 0 and lists.gram is not None and recipe.outputs:
            first, last = recipe.soft
            error = output_loss(scores, lists, batch.k, first * (last / first) ** late)
            found["output"] = (error * lists.weight).sum() / batch.total
            loss = loss + recipe.outputs * found["output"] / self._scale(found["output"])
        return {"loss": loss, **found}

    def _scale(self, error: Tensor) -> Tensor:
        """The error of outputs when they first counted, of all ranks."""
        if not bool(self.scale):
            mean = self.trainer.strategy.reduce(error.detach().clone(), reduce_op="mean")
            self.scale.copy_(mean.clamp_min(1e-6))
        return self.scale

    def given(self, lists: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a student is shown of lists."""
        features = lists.features[..., self.columns]
        return features, lists.context, lists.layer, lists.head, lists.candidate

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; decay of matrices alone, the prior and biases are left where they are."""
        every = list(self.student.parameters())
        groups = [
            {"params": [x for x in every if x.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [x for x in every if x.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99))

    def rate(self, step: int) -> float:
        """It rises for a while, then falls along a half cosine."""
        own = self.recipe
        rising = max(1.0, own.warmup * own.steps)
        if step < rising:
            return own.lr * (step + 1) / (rising + 1)
        late = min(1.0, (step - rising) / max(1.0, own.steps - rising))
        return own.final + (own.lr - own.final) * (1 + math.cos(math.pi * late)) / 2

    # -- looking at held-out lists -------------------------------------------------------------

    def validation_step(self, lists: Lists, index: int) -> None:
        """Judge the averaged student; at the first look also what it is compared with."""
        student: ListMetric = self.metrics["student"]
        if index not in self._cuts:
            self._cuts[index] = cuts_of(lists, student.budgets, student.outputs)
        cuts = self._cuts[index]
        scores = self.average(*self.given(lists))
        student.update(scores.masked_fill(~lists.candidate, 0.0), lists, cuts)
        for name, scores_of in ({} if self._told else BASELINES).items():
            self.metrics[name].update(scores_of(lists), lists, cuts)

    def on_validation_epoch_end(self) -> None:
        """Log what all ranks have found, and keep the best student."""
        found = {f"val/{name}": x for name, x in self.looked("student").items()}
        if not self._told:
            for name in BASELINES:
                own = self.looked(name)
                found |= {f"baseline/{name}/{measure}": x for measure, x in own.items()}
            self._told = True
        shared = self._together()  # all ranks have the same; Lightning wants to be told
        self.log_dict({name: x.float() for name, x in found.items()}, sync_dist=shared)
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        regret = found[self.monitor(self.trainer.datamodule.held_out.lists)].float().to(self.least)
        if regret < self.least:
            self.least.copy_(regret)
            self.best.load_state_dict(self.average.state_dict())

    def looked(self, name: str) -> dict[str, Tensor]:
        """Every measure of a ranking, over all ranks; and begin anew."""
        metric: ListMetric = self.metrics[name]
        found = metric.compute()
        metric.reset()
        return found

    def state_dict_of_student(self) -> dict[str, Tensor]:
        """Weights that are learned, and their averages."""
        found = {"student": self.student, "average": self.average}
        return {f"{k}.{n}": x for k, own in found.items() for n, x in own.state_dict().items()}

    def distilled(self) -> Scorer:
        """The best student of all looks; the last average where there was none."""
        looked = bool(self.least.isfinite())
        student = copy.deepcopy(self.best if looked else self.average).cpu()
        student.settings = dict(self.scorer.student.settings)
        return replace(self.scorer, student=student.eval().requires_grad_(False), about={})


def check_recipe(recipe: DistillRecipe) -> None:
    """Refuse a recipe that cannot be followed.

    Raises:
        ValueError: Names the setting.
    """
    told = asdict(recipe)
    whole = {name: told[name] for name in ("steps", "batch", "looks", "patience")}
    check_numbers("A student", whole, 1, whole=True)
    above = {name: told[name] for name in ("lr", "tau", "newest")}
    above |= dict(zip(("soft, first", "soft, last"), recipe.soft, strict=True))
    check_numbers("A student", above, 0, above=True)
    rest = {name: told[name] for name in ("final", "weight_decay", "cut", "penalty", "outputs")}
    check_numbers("A student", rest, 0)
    check_numbers("A student", {name: told[name] for name in ("warmup", "first")}, 0, 1)
