"""Which KV-cache policy, at what budget, and what does it cost in quality?"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_kv.models import build_model, load_model
    from lightning_kv.policies.registry import load_policy, preset
    from lightning_kv.rollout import Rollout, rollout

__version__ = "0.1.0"

_HOMES = {
    "Rollout": "rollout",
    "build_model": "models",
    "load_model": "models",
    "load_policy": "policies.registry",
    "preset": "policies.registry",
    "rollout": "rollout",
}

__all__ = [
    "Rollout",
    "__version__",
    "build_model",
    "load_model",
    "load_policy",
    "preset",
    "rollout",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for: the command line and pytest import this package without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """``rollout`` is a module and the function in it; the package's name is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
