"""Which KV-cache policy, at what budget, and what does it cost in quality?"""

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "lightning_kv.models",
    "build_model": "lightning_kv.models",
    "preset": "lightning_kv.policies.presets",
    "load_policy": "lightning_kv.policies.presets",
    "rollout": "lightning_kv.rollout",
}

__all__ = ["__version__", "build_model", "load_model", "load_policy", "preset", "rollout"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import lightning_kv` is quick."""
    from importlib import import_module

    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lightning_kv' has no attribute {name!r}")
