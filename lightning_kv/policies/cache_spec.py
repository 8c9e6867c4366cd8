"""The cache that frames are chosen from: what head curves were measured with, what a policy has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.part import SHARED

if TYPE_CHECKING:
    from lightning_kv.policies.base import CachePolicy
    from lightning_kv.policies.scored import ScoredPart


@dataclass(frozen=True)
class CacheSpec:
    """What a part chooses a head's frames from.

    Args:
        window: History frames that are held; 0 for all; None where that is not known, or the part
            that chooses is the one that holds.
        sink: First frames of the clip that are held however old they are.
        kept: First frames of the clip that the part never leaves out.
        policy: Whose it is, for errors.
    """

    window: int | None = None
    sink: int = 0
    kept: int = 0
    policy: str = field(default="", compare=False)

    @classmethod
    def of_policy(cls, policy: CachePolicy, part: ScoredPart) -> CacheSpec:
        """What the retain or the select part of a policy has."""
        kept, held = sink_of(vars(part)), policy.retain
        if part is held:
            return cls(kept=kept, policy=policy.name)
        window = window_of(held.name, held.budget and held.budget.amount)
        return cls(window, sink_of(vars(held)), kept, policy.name)

    @classmethod
    def of_file(cls, cache: Any) -> CacheSpec | None:
        """What a file of head curves was measured with, as it says; None where it does not.

        Args:
            cache: ``reference``, a policy as plain data, and ``sink``, of every head.
        """
        reference = cache.get("reference") if isinstance(cache, dict) else None
        if not isinstance(reference, dict):
            return None
        held = reference["retain"]
        amount = (held.get("budget") or {}).get("amount")
        return cls(window_of(held["part"], amount), sink_of(held), cache.get("sink", 0))

    def differing(self, other: CacheSpec, history: int) -> list[str]:
        """What another cache has otherwise, in rollouts with so much history.

        Args:
            other: Of a policy; this one is that of curves.
            history: The most history frames there are.
        """
        found = []
        if None not in (self.window, other.window):
            most = [min(own.window or history, history) for own in (self, other)]
            if most[0] != most[1]:
                found.append("window")
            if max(most) < history and self.sink != other.sink:
                found.append("sink")
        return found + ["kept"] * (self.kept > other.kept)

    def words(self, names: list[str]) -> str:
        """Some of it in words."""
        told = {
            "window": f"{self.window or 'all'} frames of history held",
            "sink": f"the first {self.sink} of the clip among them",
            "kept": f"the first {self.kept} kept in every head",
        }
        return " and ".join(told[name] for name in names)


def window_of(retain: str, amount: str | None) -> int | None:
    """History frames that a retain part holds; 0 for all, None where that is not known."""
    if retain == SHARED:
        return 0
    own = amount and Amount.parse(amount)
    return int(own.value) if own and own.unit == "f" else None


def sink_of(settings: dict[str, Any]) -> int:
    """First frames that a part never drops; what is a share of something does not count."""
    return int(settings.get("sink") or 0)
