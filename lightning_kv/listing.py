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

    from lightning_kv.policies.part import Part
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
    """Models that can be rolled out: whose, how large, where they go, and what brings them."""
    from lightning_kv.models.catalogue import CATALOGUE, PARTS
    from lightning_kv.models.embedded import shipped
    from lightning_kv.models.sizes import PRESETS, parameters

    rows = [
        {
            "model": name,
            "about": "The embedded panorama world, trained for this package.",
            "source": "this package",
            "licence": "Apache-2.0",
            "size": f"{parameters(PRESETS[name]):,} parameters",
            "sampling": sampling(PRESETS[name]),
            "place": "in this package",
            "type": f"--model {name}",
        }
        for name in shipped()
    ]
    for one in (*CATALOGUE.values(), *PARTS.values()):
        row = {
            "model": one.name,
            "about": one.about,
            "source": f"https://github.com/{one.project}, {one.page}",
            "licence": one.licence,
            "size": "download not measured" if one.gigabytes is None else f"{one.gigabytes:g} GB",
        }
        use = "all Wan models find it there"
        if one.name in CATALOGUE:
            row["size"] = f"{parameters(one.config):,} parameters, {row['size']}"
            row["sampling"] = sampling(one.config)
            use = f"--model {one.name}"
        row["place"] = str(one.root or one.folder)
        row["type"] = use if one.root else f"lightning-kv fetch {one.name}"
        rows.append(row)
    return rows


def sampling(config: Any) -> str:
    """How a checkpoint is sampled, in a line."""
    steps = len(config.timesteps)
    unit = "frame by frame" if config.chunk == 1 else f"chunks of {config.chunk}"
    how = f"{unit}, {steps} steps" if config.sampler != "rolling" else f"{steps} {unit} in flight"
    return f"{how}, trained on {config.train_horizon} frames"


def metrics() -> list[dict[str, Any]]:
    """Metrics, each with the networks it is known on, and whether their weights are here."""
    from lightning_kv.metrics import METRICS, SETS, Choice
    from lightning_kv.metrics.suite import explained, networks

    rows = []
    for base in (*METRICS, *SETS):
        kind = SETS.get(base) or METRICS[base]
        wanted = Choice.parse(base).needs
        needs = [explained(n) for n in sorted(wanted) if f"reference_{n}" not in wanted]
        better = {True: "higher", False: "lower", None: "neither"}[kind.higher_is_better]
        for network in networks(base) or (None,):
            choice = Choice(base, network)
            rows.append(
                {
                    "metric": choice.name,
                    "unit": kind.unit or "-",
                    "better": better,
                    "needs": ", ".join(needs),
                    "weights": weights(choice),
                }
            )
    return rows


def weights(choice: Any) -> str:
    """Where the weights of a metric's network come from."""
    from lightning_kv.metrics.backbones import WeightsUnavailable
    from lightning_kv.metrics.backbones.weights import WEIGHTS, locate
    from lightning_kv.metrics.perceptual import TRUNKS

    name = TRUNKS.get(choice.network, (choice.network,))[0]
    if name not in WEIGHTS:
        return "none needed" if name is None else "in this package"
    try:
        locate(name, accept=[WEIGHTS[name].licence])
        return "here"
    except WeightsUnavailable:
        return f"lightning-kv fetch {name}"
