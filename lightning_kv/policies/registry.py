"""Policies from names, files and plain data; parts and published methods by name."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from lightning_kv import policies
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.part import KINDS, PARTS, PRESETS, BudgetPart, Part, Preset
from lightning_kv.policies.plugins import (
    CLASHES,
    HOME,
    address,
    checked,
    imported,
    installed_parts,
)
from lightning_kv.policies.scored import ScoredPart
from lightning_kv.policies.tables import HeadTable
from lightning_kv.utilities.nearest import unknown

SLOTS = tuple(kind for kind in KINDS if kind != "budget")
"""Parts that a policy has one each of; budgets belong to those that score."""

DEFAULTS = {
    "retain": "everything",
    "select": "everything",
    "budget": "uniform",
    "positions": "absolute",
    "precision": "as-computed",
}


@cache
def discover() -> None:
    """Import every part file and what installed packages offer: none needs an entry anywhere.

    Raises:
        ValueError: Two parts or two published methods want one name.
    """
    for kind in KINDS:
        package = importlib.import_module(f"{policies.__name__}.{kind}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    installed_parts()


@cache
def _drop_broken() -> None:
    """Published methods of other packages that cannot be built are warned about and left out."""
    for name, (own, cls) in list(PRESETS.items()):
        if cls.__module__.startswith(HOME):
            continue
        try:
            policy_from_dict({"name": name, **own.parts})
        except ValueError as error:
            del PRESETS[name]
            warnings.warn(
                f"The published method {name!r} of {address(cls)} cannot be built. {error} It is "
                "left out: mend its `parts`.",
                stacklevel=2,
            )


def presets(without_tables: bool = False, any_model: bool = False) -> dict[str, Preset]:
    """The published methods: the full cache first, then by kind and file of their main part.

    In whatever order files were imported; those of other packages come last in their kind.

    Args:
        without_tables: Leave out those that need a table of a reference rollout, or a side input
            such as the camera's pose: all others run from a prompt alone.
        any_model: Leave out those that bring a head table of one model, and so fit no other.
    """
    discover()
    _drop_broken()
    order = sorted(PRESETS.values(), key=lambda own: _place(own[1]))
    names = ["full", *(own.name for own, _ in order if own.name != "full")]
    made = {n: preset(n) for n in names} if without_tables or any_model else {}
    left_out = {n for n, own in made.items() if without_tables and (own.needs or own.inputs)}
    left_out |= {n for n, own in made.items() if any_model and _of_one_model(own)}
    return {n: PRESETS[n][0] for n in names if n not in left_out}


def _place(cls: type[Part]) -> tuple[int, bool, str]:
    """Kind and file of a part; files of other packages stay in the order of their import."""
    home = cls.__module__.startswith(HOME)
    return KINDS.index(cls.kind), not home, cls.__module__ if home else ""


def _of_one_model(policy: CachePolicy) -> bool:
    """Whether a part holds a head table that is one model's, and not the one ``auto`` finds."""
    values = [getattr(part, own.name) for part in policy.parts for own in fields(part)]
    return any(isinstance(x, HeadTable) and x.file not in (None, "auto") for x in values)


def preset(name: str) -> CachePolicy:
    """A policy by name: of a published method, of a part, or ``package.module:Class``.

    ``NAME@BUDGET`` (``top-attention@9f``) sets its budget. A part alone is a policy that is the
    full cache otherwise.

    Raises:
        ValueError: Unknown name, or a budget that is not one.
    """
    base, at, amount = name.rpartition("@") if "@" in name else (name, "", "")
    refuse_clash(base)
    if ":" not in base and base in presets():
        policy = policy_from_dict({"name": base, **presets()[base].parts})
    else:
        policy = _alone(base)
    return policy.budgeted(amount, name) if at else replace(policy, asked=False)


def refuse_clash(name: str) -> None:
    """Refuse a name that two installed packages want.

    Raises:
        ValueError: Says which.
    """
    discover()
    if name in CLASHES:
        raise ValueError(CLASHES[name])


def sized(name: str, amount: str) -> str:
    """``NAME@AMOUNT`` of a policy that has a budget; the name alone of one that has none."""
    made = preset(name)
    limited = made.retain.budget is not None or made.select.budget is not None
    return f"{name}@{amount}" if limited else name


def _alone(name: str) -> CachePolicy:
    """A policy of one part that is named."""
    found = (
        [imported(name)] if ":" in name else [own[name] for own in PARTS.values() if name in own]
    )
    if not found:
        every = {part for own in PARTS.values() for part in own} | presets().keys()
        raise ValueError(unknown("policy", name, sorted(every)))
    kinds = [cls.kind for cls in found]
    if len(found) > 1 or kinds == ["budget"]:
        way = "name: mine, retain: {part: window, budget: {part: table, ...}}"
        raise ValueError(
            f"{name!r} alone is no policy: it is a {' and a '.join(kinds)} part. Say in a policy "
            f"file what it belongs to, such as {{{way}}}."
        )
    cls = found[0]
    own: dict[str, Any] = {"part": name}
    if issubclass(cls, ScoredPart) and cls.limited:
        own["budget"] = BudgetPart.amount
    return policy_from_dict({"name": name, cls.kind: own})


def load_policy(spec: str | dict[str, Any]) -> CachePolicy:
    """A policy from a name, a YAML file with its own ``name:``, or plain data.

    ``FILE.yaml@BUDGET`` sets the budget of a file's policy; it is then called ``NAME@BUDGET``.
    Paths in a file are relative to its folder.

    Raises:
        ValueError: Nothing of that name or path, or an unknown part or key.
    """
    if isinstance(spec, dict):
        return policy_from_dict(spec)
    file, amount = _file(spec)
    if not file:
        return preset(spec)
    policy = _from_file(Path(file), ())
    return policy.budgeted(amount, f"{policy.name}@{amount}") if amount else policy


def _file(spec: str) -> tuple[str, str]:
    """Path of a policy file and the budget behind it; no path where it is a name."""
    head, _, tail = spec.rpartition("@")
    for path, amount in ((spec, ""), (head, tail)):
        if path.lower().endswith((".yaml", ".yml")):
            return path, amount
    return "", ""


def _from_file(path: Path, above: tuple[Any, ...]) -> CachePolicy:
    """The policy of a file; ``above`` are those that start from it, none of which it may be."""
    if not path.is_file():
        raise ValueError(
            f"No policy file {str(path)!r}. Give a path to a YAML file, or a name of "
            "`lightning-kv list policies`."
        )
    own = (*above, path.resolve())
    try:
        return _made(_content(path), path.parent, own)
    except ValueError as error:
        raise ValueError(f"In the policy file {str(path)!r}: {error}") from error


def _content(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8-sig"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"It is no YAML: {error}. A policy file is text in UTF-8 with `name:` and its parts."
        ) from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ValueError(f"It holds no mapping but {found}. Give `name:` and its parts.")
    return values


def policy_from_dict(values: dict[str, Any], folder: Path = Path()) -> CachePolicy:
    """Build a policy from ``name`` and the parts that differ from the full cache.

    >>> policy_from_dict({"name": "mine", "retain": {"part": "window", "budget": "6f"}}).retain
    Window(budget=Uniform(amount='6f'), sink=0, switch='keep')

    ``base`` names a policy to start from: other parts replace its own, and settings without
    ``part`` change them.

    >>> values = {"name": "moved@9f", "base": "sink-window@9f", "positions": "contiguous"}
    >>> policy_from_dict(values | {"retain": {"sink": 1}}).retain
    Window(budget=Uniform(amount='9f'), sink=1, switch='keep')

    Args:
        values: As in a policy file.
        folder: Where paths start.

    Raises:
        ValueError: No name, an unknown key, an unknown part, or a wrong setting of a part.
    """
    return _made(values, folder, (id(values),))


def _made(values: dict[str, Any], folder: Path, above: tuple[Any, ...]) -> CachePolicy:
    """The policy of plain data; ``above`` are the files and data that start from it."""
    known = [field.name for field in fields(CachePolicy) if field.name != "asked"]
    for key in values:
        if key not in (*known, "base"):
            raise ValueError(unknown("key of a policy", key, [*known, "base"]))
    if not values.get("name"):
        raise ValueError(f"A policy without `name:`: {values}. The name is its key in results.")
    asked = True
    if values.get("base") is not None:
        base = _base(values["name"], values["base"], folder, above)
        values, asked = _over(policy_to_dict(base), values), base.asked
    parts = {kind: build_part(kind, values.get(kind) or DEFAULTS[kind], folder) for kind in SLOTS}
    others = {key: values[key] for key in ("bias", "branches") if key in values}
    return CachePolicy(str(values["name"]), **parts, **others, asked=asked)


def _base(name: str, base: Any, folder: Path, above: tuple[Any, ...]) -> CachePolicy:
    """What a policy starts from; a file is sought from the folder of the one that names it."""
    way = "Start from a preset, such as sink-window@9f, or from another file."
    if not isinstance(base, str | dict):
        raise ValueError(f"The policy {name!r} starts from no policy: base: {base!r}. {way}")
    file, amount = _file(base) if isinstance(base, str) else ("", "")
    path = folder / file if (folder / file).is_file() else Path(file)
    if (path.resolve() if file else id(base)) in above:
        given = repr(base) if file else "itself"
        raise ValueError(f"The policy {name!r} starts from itself: base: {given}. {way}")
    if isinstance(base, dict):
        return _made(base, folder, (*above, id(base)))
    if not file:
        return preset(base)
    made = _from_file(path, above)
    return made.budgeted(amount, f"{made.name}@{amount}") if amount else made


def _over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """One policy's plain data with another's on top; settings without ``part`` are set in place."""
    own = {key: value for key, value in values.items() if key != "base"}
    for kind in SLOTS:
        if isinstance(own.get(kind), dict) and "part" not in own[kind]:
            own[kind] = base[kind] | own[kind]
    return base | own


def part_class(kind: str, name: Any) -> type[Part]:
    """The part of a kind that is called so, or lies at ``package.module:Class``.

    Raises:
        ValueError: There is none, or it is of another kind.
    """
    discover()
    if isinstance(name, str) and ":" in name:
        found = imported(name)
        if found.kind != kind:
            raise ValueError(
                f"{name!r} is given as the {kind} part, and it is a {found.kind} part. "
                f"Write it under `{found.kind}:`."
            )
        return found
    if not isinstance(name, str) or name not in PARTS[kind]:
        elsewhere = [other for other in KINDS if isinstance(name, str) and name in PARTS[other]]
        if elsewhere:
            raise ValueError(
                f"{name!r} is given as the {kind} part, and it is a {elsewhere[0]} part. Write it "
                f"under `{elsewhere[0]}:`, and under `{kind}:` one of: "
                f"{', '.join(sorted(PARTS[kind]))}."
            )
        if isinstance(name, str) and name in PRESETS:
            raise ValueError(
                f"{name!r} is given as the {kind} part, and it is a published method. It is made "
                f"of {PRESETS[name][0].parts or 'the default parts'}: write these instead."
            )
        raise ValueError(unknown(f"{kind} part", name, sorted(PARTS[kind])))
    refuse_clash(name)
    return checked(PARTS[kind][name])


def build_part(kind: str, spec: str | dict[str, Any], folder: Path = Path()) -> Part:
    """A part from its name, or from ``{"part": name, setting: value, ...}``.

    Raises:
        ValueError: No such part or setting, or a value that does not fit.
    """
    settings = dict(spec) if isinstance(spec, dict) else {"part": spec}
    name = settings.pop("part", DEFAULTS[kind])
    cls = part_class(kind, name)
    try:
        hints = get_type_hints(cls)
    except Exception as error:  # somebody else's annotations may name anything
        raise ValueError(
            f"The settings of the {kind} part {name!r} have types that cannot be read. "
            f"{type(error).__name__}: {error}. Import what their annotations name."
        ) from error
    allowed = [field.name for field in fields(cls)]
    for key, value in settings.items():
        if key not in allowed:
            raise ValueError(_no_setting(cls, name, key))
        if isinstance(value, str | Path) and hasattr(hints[key], "read"):
            value = hints[key].read(value, key, folder)  # by name, or a file that the part reads
        elif key == "budget" and value is not None and not isinstance(value, BudgetPart):
            value = build_budget(value, folder)
        settings[key] = frozen(value)
        check_type(kind, name, key, settings[key], hints[key])
    if settings.get("budget") is not None and not cls.limited:
        raise ValueError(
            f"The {kind} part {name!r} takes no budget, and {settings['budget'].amount} was "
            "given. Leave it out, or use a part that chooses what to keep or read."
        )
    needed = [
        own.name
        for own in fields(cls)
        if own.default is MISSING and own.default_factory is MISSING and own.name not in settings
    ]
    if needed:
        raise ValueError(
            f"The {kind} part {name!r} needs {', '.join(needed)}. Given: {settings or 'nothing'}. "
            f"Write them beside `part: {name}`."
        )
    try:
        return cls(**settings)
    except ValueError:
        raise
    except Exception as error:  # somebody else's checks may raise anything
        raise ValueError(
            f"The {kind} part {name!r} does not take {settings}. {type(error).__name__}: {error}. "
            "Give other settings, or mend its __post_init__."
        ) from error


def _no_setting(cls: type[Part], name: str, key: Any) -> str:
    """What to say of a setting that a part does not have."""
    kind = cls.kind
    known = [own.name for own in fields(cls) if own.name != "budget" or cls.limited]
    if known:
        return unknown(f"setting of the {kind} part {name!r}", key, known)
    having = [own for own, each in PARTS[kind].items() if key in each.__dataclass_fields__]
    way = f"Write it beside a part that has it: `part: {' or '.join(having)}`."
    return (
        f"The {kind} part {name!r} has no settings, and {key!r} was given. "
        f"{way if having else 'Leave it out.'}"
    )


def frozen(value: Any) -> Any:
    """Lists as tuples, at every depth: parts are hashable."""
    if isinstance(value, dict):
        return {key: frozen(own) for key, own in value.items()}
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


def build_budget(spec: str | float | dict[str, Any], folder: Path = Path()) -> Part:
    """A budget: an amount alone means the same for every head."""
    return build_part("budget", spec if isinstance(spec, dict) else {"amount": str(spec)}, folder)


def policy_to_dict(policy: CachePolicy) -> dict[str, Any]:
    """Plain data from which :func:`policy_from_dict` makes the same policy.

    Of a file that a part has read it holds the name, the SHA-256 and what was read.
    """
    out: dict[str, Any] = {"name": policy.name}
    out |= {kind: _plain(getattr(policy, kind)) for kind in SLOTS}
    return out | {"bias": policy.bias, "branches": policy.branches}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        own = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"part": address(type(value))} | own
    return asdict(value) if is_dataclass(value) else value
