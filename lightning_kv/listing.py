"""What there is to choose from, as plain rows."""

from __future__ import annotations

from typing import Any

KINDS = ("policies", "parts", "models", "metrics")


def listing(what: str) -> list[dict[str, Any]]:
    """Rows about ``policies``, ``parts``, ``models`` or ``metrics``."""
    return {"policies": policies, "parts": parts, "models": models, "metrics": metrics}[what]()


def policies() -> list[dict[str, Any]]:
    """The named presets and the parts they are made of."""
    from lightning_kv.policies.presets import ABOUT, DEFAULTS, PRESETS, policy_to_dict, preset

    rows = []
    for name in PRESETS:
        config = policy_to_dict(preset(name))
        differ = {
            kind: config[kind]["part"]
            for kind in DEFAULTS
            if kind in config and config[kind]["part"] != DEFAULTS[kind]
        }
        made = ", ".join(f"{kind}: {part}" for kind, part in differ.items()) or "-"
        rows.append({"policy": name, "about": ABOUT[name], "parts": made})
    return rows


def parts() -> list[dict[str, Any]]:
    """Every part, by kind: what free combinations are made of."""
    import dataclasses

    from lightning_kv.policies.base import Part
    from lightning_kv.policies.presets import discover

    discover()
    return [
        {
            "kind": kind,
            "part": name,
            "settings": ", ".join(field.name for field in dataclasses.fields(cls)) or "-",
            "about": (cls.__doc__ or "").strip().splitlines()[0],
        }
        for kind, known in Part.registry.items()
        for name, cls in sorted(known.items())
    ]


def models() -> list[dict[str, Any]]:
    """Model presets; which of them have weights here."""
    from lightning_kv.models.loading import PRESETS, WEIGHTS, build_model

    rows = []
    for name, config in PRESETS.items():
        here = (WEIGHTS / f"{name}.safetensors").is_file()
        count = sum(p.numel() for p in build_model(name, "meta").parameters())
        rows.append(
            {
                "model": name,
                "parameters": count,
                "layers x heads": f"{config.layers} x {config.heads}",
                "chunk": config.chunk,
                "train horizon": config.train_horizon,
                "weights": "in this package" if here else "none here",
            }
        )
    return rows


def metrics() -> list[dict[str, Any]]:
    """Metrics and their recipes."""
    from lightning_kv.metrics import METRICS

    return [
        {
            "metric": name,
            "unit": metric.unit or "-",
            "better": "higher" if metric.higher_is_better else "lower",
            "recipe": metric.recipe,
        }
        for name, metric in METRICS.items()
    ]
