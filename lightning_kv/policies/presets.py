"""Published methods by name, and policies from names, files and plain data."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from lightning_kv import policies
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.part import BudgetPart, Part

PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding-window": {"retain": {"part": "window", "budget": "9f"}},
    "sink-window": {"retain": {"part": "window", "sink": 3, "budget": "9f"}},
    "longlive": {"retain": {"part": "window", "sink": 3, "budget": "9f", "switch": "recache"}},
    "infinity-rope": {
        "retain": {"part": "window", "sink": 1, "budget": "3f", "switch": "flush"},
        "positions": "contiguous",
    },
    "rolling-forcing": {
        "retain": {"part": "window", "sink": 3, "budget": "21f"},
        "select": {"part": "reach", "reach": 21, "sink": 3},
        "positions": {"part": "sink-lag", "sink": 3, "lag": 21, "to": "end"},
    },
    "top-attention": {"select": {"part": "top-attention", "budget": "9f"}},
    "random": {"select": {"part": "random", "budget": "9f"}},
    "h2o": {"retain": {"part": "heavy-hitters", "budget": "9f"}},
    "focused-forcing": {"select": {"part": "focused", "budget": "9f"}},
    "future-forcing": {"retain": {"part": "future", "budget": "9f"}},
    "future-focused": {
        "retain": {"part": "future", "budget": "15f"},
        "select": {"part": "focused", "budget": "9f"},
    },
}
"""One line says what a preset is: the parts that differ from the full cache."""

ABOUT = {
    "full": "Keep and read everything: the reference.",
    "sliding-window": "Keep the newest frames (Self Forcing's rolling cache, arXiv 2506.08009).",
    "sink-window": "Keep the first 3 frames and the newest (StreamingLLM, arXiv 2309.17453).",
    "longlive": "The same, encoded again under the new prompt at a prompt switch "
    "(LongLive, arXiv 2509.22622).",
    "infinity-rope": "Keep the first frame and the newest, at rotary times side by side; flush at "
    "a prompt switch (Infinity-RoPE, arXiv 2511.20649).",
    "rolling-forcing": "Keep the first chunk and the newest, read what shares a reach of 21 frames "
    "with the chunks in flight, the first moved up (Rolling Forcing, arXiv 2509.25161).",
    "top-attention": "Keep everything, read the frames with the largest softmax mass, per head.",
    "random": "Keep everything, read random frames and the last chunk: the control.",
    "h2o": "Keep the frames with the largest accumulated softmax mass (H2O, arXiv 2306.14048).",
    "focused-forcing": "Keep everything, read what is looked at and diverse, per head and query "
    "frame (Focused Forcing, arXiv 2605.18346).",
    "future-forcing": "Keep what queries to come will ask for, once "
    "(Future Forcing, arXiv 2605.30083; rebuilt from its description).",
    "future-focused": "Future Forcing's memory, Focused Forcing's reads.",
}

DEFAULTS = {
    "retain": "everything",
    "select": "everything",
    "budget": "uniform",
    "positions": "absolute",
    "precision": "as-computed",
}


def discover() -> None:
    """Import every part file, so that a new file needs no entry anywhere."""
    for kind in Part.registry:
        package = importlib.import_module(f"{policies.__name__}.{kind}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def preset(name: str) -> CachePolicy:
    """A published method: ``NAME``, or ``NAME@BUDGET`` (``top-attention@9f``).

    Raises:
        ValueError: Unknown name, or a budget that is not one.
    """
    base, _, amount = name.partition("@")
    if base not in PRESETS:
        raise ValueError(unknown("policy", base, PRESETS))
    policy = policy_from_dict({"name": base, **PRESETS[base]})
    return policy.budgeted(amount, name) if "@" in name else replace(policy, asked=False)


def load_policy(spec: str | dict[str, Any]) -> CachePolicy:
    """A policy from a preset's name, a YAML file with its own ``name:``, or plain data.

    Raises:
        ValueError: Nothing of that name or path, or an unknown part or key.
    """
    if isinstance(spec, dict):
        return policy_from_dict(spec)
    if not spec.endswith((".yaml", ".yml")):
        return preset(spec)
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"No policy file {spec!r}. Give a path to a YAML file, or a preset name.")
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(
            f"{spec!r} is no YAML: {error}. A policy file has `name:` and its parts."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{spec!r} holds no mapping. A policy file has `name:` and its parts.")
    return policy_from_dict(values)


def policy_from_dict(values: dict[str, Any]) -> CachePolicy:
    """Build a policy from ``name`` and the parts that differ from the full cache.

    >>> policy_from_dict({"name": "mine", "retain": {"part": "window", "budget": "6f"}}).retain
    Window(budget=Uniform(amount='6f'), sink=0, switch='keep')

    Raises:
        ValueError: No name, an unknown key, an unknown part, or a wrong setting of a part.
    """
    known = [field.name for field in fields(CachePolicy) if field.name != "asked"]
    for key in values:
        if key not in known:
            raise ValueError(unknown("key of a policy", key, known))
    if not values.get("name"):
        raise ValueError(f"A policy without `name:`: {values}. The name is its key in results.")
    parts = {
        kind: build_part(kind, values.get(kind) or DEFAULTS[kind])
        for kind in ("retain", "select", "positions", "precision")
    }
    others = {key: values[key] for key in ("bias", "branches") if key in values}
    return CachePolicy(str(values["name"]), **parts, **others)


def build_part(kind: str, spec: str | dict[str, Any]) -> Part:
    """A part from its name, or from ``{"part": name, setting: value, ...}``."""
    discover()
    known = Part.registry[kind]
    settings = dict(spec) if isinstance(spec, dict) else {"part": spec}
    name = settings.pop("part", DEFAULTS[kind])
    if not isinstance(name, str) or name not in known:
        raise ValueError(unknown(f"{kind} part", name, known))
    cls = known[name]
    allowed = [field.name for field in fields(cls)]
    for key in settings:
        if key not in allowed:
            raise ValueError(unknown(f"setting of the {kind} part {name!r}", key, allowed))
    if settings.get("budget") is not None and not isinstance(settings["budget"], BudgetPart):
        settings["budget"] = build_budget(settings["budget"])
    settings = {key: frozen(value) for key, value in cls.prepared(settings).items()}
    for key, value in settings.items():
        check_type(kind, name, key, value, get_type_hints(cls)[key])
    return cls(**settings)


def frozen(value: Any) -> Any:
    """Lists as tuples, at every depth: parts are hashable."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def check_type(kind: str, part: str, key: str, value: Any, hint: Any) -> None:
    """Refuse a setting that is no number, word or switch where one is expected.

    Raises:
        ValueError: Says what would be.
    """
    choices = (hint,) if get_origin(hint) is tuple else get_args(hint) or (hint,)
    allowed = [t for t in choices if t in (int, float, str, bool, NoneType)]
    kinds = (*allowed, int) if float in allowed else tuple(allowed)
    plain = bool in allowed if isinstance(value, bool) else isinstance(value, kinds)
    if allowed and not plain and not isinstance(value, Part):
        names = " or ".join("none" if t is NoneType else t.__name__ for t in allowed)
        raise ValueError(
            f"The setting {key!r} of the {kind} part {part!r} is {value!r}. It takes {names}."
        )


def build_budget(spec: str | float | dict[str, Any]) -> Part:
    """A budget: an amount alone means the same for every head."""
    return build_part("budget", spec if isinstance(spec, dict) else {"amount": str(spec)})


def policy_to_dict(policy: CachePolicy) -> dict[str, Any]:
    """Plain data from which :func:`policy_from_dict` makes the same policy."""
    out: dict[str, Any] = {"name": policy.name}
    for kind in ("retain", "select", "positions", "precision"):
        out[kind] = _part_to_dict(getattr(policy, kind))
    return out | {"bias": policy.bias, "branches": policy.branches}


def _part_to_dict(part: Part) -> dict[str, Any]:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {"part": part.name} | {
        key: _part_to_dict(value) if isinstance(value, Part) else value
        for key, value in values.items()
    }


def unknown(what: str, given: str, known: Any) -> str:
    """Text of an error about an unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"No {what} {given!r}.{hint} Known: {', '.join(names)}."
