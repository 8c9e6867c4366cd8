"""One clip after the other: what rankings keep of its frames, on two memories at each budget.

Shapes: M measures, L layers, H heads, N lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.calibration.clips import ClipMeter, ClipRecord
from lightning_kv.distillation.collect import Taught
from lightning_kv.distillation.judging import OWN, ListMetric, cuts_of
from lightning_kv.distillation.lists import Lists
from lightning_kv.distillation.samples import lists_of_clip
from lightning_kv.policies.base import CachePolicy
from lightning_kv.rollout import Rollout, rollout
from lightning_kv.tasks.proof.scorer_design import ScorerDesign

TEACHER_LED, SCORER_LED = 0, 1
"""Who decided what the memory holds: off-policy and on-policy."""


@dataclass(frozen=True, eq=False)
class ScorerMeter(ClipMeter):
    """Measures clips, one at a time, by the decisions that their rollouts come to.

    A record has a site for each budget and each of :data:`TEACHER_LED` and :data:`SCORER_LED`. It
    holds, of every ranking, the sums ``[M, 2, L H]`` of
    :class:`~lightning_kv.distillation.judging.ListMetric`, and the number of ``lists``.

    Args:
        design: What is compared.
    """

    design: ScorerDesign | None = None

    def of_prompt(
        self,
        key: str,
        unit: str,
        prompt: str,
        context: Tensor | None = None,
        validates: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> ClipRecord:
        """A clip that the model makes of a prompt, as :class:`ClipMeter` has it.

        Raises:
            ValueError: Nothing has to be dropped at some budget.
        """
        given = 0 if context is None else len(context)
        count = self.model.network.config.plan(self.frames, given).count
        share = 1 / (count * (1 + 2 * len(self.design.budgets)))

        def rolled(policy: CachePolicy, **more: Any) -> Rollout:
            return self._led(policy, key, prompt, context, share, progress, **more)

        tables = rolled(self.reference, record=self.design.needs).tables
        found = {}
        for budget in self.design.budgets:
            for who in (TEACHER_LED, SCORER_LED):
                policy = self.design.policy(budget, who == SCORER_LED)
                rolled(policy, tables={name: tables[name] for name in policy.retain.needs})
                own = {name: table[0] for name, table in tables.items()}
                lists = self._lists(policy.retain, own, key, policy.name)
                found[budget, who] = self._judged(lists, f"{key} {policy.name}")
        return ClipRecord(key, unit, found)

    def _led(
        self,
        policy: CachePolicy,
        key: str,
        prompt: str,
        context: Tensor | None,
        share: float,
        progress: Callable[[float], None] | None,
        **more: Any,
    ) -> Rollout:
        with torch.inference_mode(False):
            given = None if context is None else context.clone().unsqueeze(0)
        return rollout(
            self.model,
            policy,
            prompt,
            self.frames,
            keys=[key],
            context=given,
            decode=False,
            progress=lambda *_: progress(share) if progress else None,
            **self._settings,
            **more,
        )

    def _lists(self, part: Taught, tables: Mapping[str, Any], key: str, name: str) -> Lists:
        """What was to be decided in a rollout.

        Raises:
            ValueError: Nothing.
        """
        queries = self.design.teacher.queries if self.design.outputs else 0
        found = lists_of_clip(part.watched, tables, self.design.teacher, key, queries)
        if found is None:
            raise ValueError(
                f"In clip {key!r} nothing has to be dropped under {name}, or nothing comes after "
                "it. Give longer clips (--frames), or smaller budgets (--means)."
            )
        return found.to("cpu")

    def _judged(self, lists: Lists, key: str) -> dict[str, Tensor]:
        """Sums of every ranking."""
        geometry, outputs = self.model.network.geometry(self.latent_size), self.design.outputs
        cuts = cuts_of(lists, [OWN], outputs)
        found = {"lists": torch.tensor(len(lists), dtype=torch.float64)}
        for name, scores in self.design.scores(lists, key).items():
            metric = ListMetric(
                [OWN], layers=geometry.layers, heads=geometry.heads, outputs=outputs
            )
            metric.update(scores, lists, cuts)
            found[name] = metric.sums[:, :, 0]
        return found
