"""What an author of a cache-policy part needs to test it: tapes, a slow twin, a conformance suite.

``pytest --pyargs lightning_kv.testing --policy my_package.module:MyPart`` runs the suite.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "schedules": ("chunked", "guided", "rolling", "without_commits"),
    "tapes": ("Tape", "random_tape", "recorded_tape"),
    "twin": ("Query", "Row", "Script", "Stream", "Twin", "turn"),
    "compare": ("Agreement", "assert_same_as_twin", "assert_same_rows", "compare_decisions",
                "held_rows"),
    "conformance": ("obey",),
}  # fmt: skip

__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Load what is asked for: pytest imports this package as a plug-in in every run."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
