"""Which KV-cache policy, at what budget, and what does it cost in quality?"""

from lightning_kv.models import build_model, load_model
from lightning_kv.policies.registry import load_policy, preset
from lightning_kv.rollout import Rollout, rollout

__version__ = "0.1.0"

__all__ = [
    "Rollout",
    "__version__",
    "build_model",
    "load_model",
    "load_policy",
    "preset",
    "rollout",
]
