"""Proofs on held-out prompts: clips are on disk as they are measured, and one rank concludes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import lightning as L

from lightning_kv.tasks.calibration.records import Wanted
from lightning_kv.tasks.callbacks.clip_records import ClipRecordWriter
from lightning_kv.tasks.proof.reads import ReadsProof, conclude
from lightning_kv.tasks.proof.scorer import ScorerProof
from lightning_kv.tasks.proof.scorer import conclude as conclude_scorer
from lightning_kv.tasks.proof.scorer_design import JUDGED
from lightning_kv.tasks.prove import ProveBudgetsModule, ProveScorerModule


class ProofWriter(ClipRecordWriter):
    """Writes a record of each clip, and at the end says what they prove.

    Args:
        records: Folder of the records.

    Attributes:
        found: What came of it, on the first rank, once the test has ended.
    """

    measured_by: ClassVar[type[ProveBudgetsModule]] = ProveBudgetsModule
    found: ReadsProof | None

    def concluded(
        self, trainer: L.Trainer, module: ProveBudgetsModule, wanted: Mapping[str, Wanted]
    ) -> ReadsProof:
        """What it proves."""
        return conclude(self.run, wanted, module.design)

    def numbers(self, found: ReadsProof) -> dict[str, float]:
        """Loss over that of uniform budgets, at each mean."""
        return {f"prove/optimal@{own.mean}f": own.found for own in found.means}


class ScorerProofWriter(ClipRecordWriter):
    """Writes a record of each clip, and at the end says what they prove of a scorer.

    Args:
        records: Folder of the records.

    Attributes:
        found: What came of it, on the first rank, once the test has ended.
    """

    measured_by: ClassVar[type[ProveScorerModule]] = ProveScorerModule
    found: ScorerProof | None

    def concluded(
        self, trainer: L.Trainer, module: ProveScorerModule, wanted: Mapping[str, Wanted]
    ) -> ScorerProof:
        """What it proves."""
        return conclude_scorer(self.run, wanted, module.design)

    def numbers(self, found: ScorerProof) -> dict[str, float]:
        """Regret at each budget."""
        return {f"prove/regret@{own.name}": own.mean(JUDGED) for own in found.budgets}
