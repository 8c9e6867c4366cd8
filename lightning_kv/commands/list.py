"""`lightning-kv list`: what there is to choose from, as plain rows."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from lightning_kv.commands.options import Command, meanings
from lightning_kv.commands.terminal import console
from lightning_kv.utilities.formatting import format_bytes
from lightning_kv.utilities.nearest import unknown


@dataclass(frozen=True)
class ListOptions:
    """What is there to choose from.

    Args:
        what: Of policies, parts, heads, models and metrics.
        names: Only these; or package.module:Class (all).
        json: For programs.
    """

    what: str
    names: list[str] = field(default_factory=list)
    json: bool = False


def run(options: ListOptions) -> None:
    """Show the rows.

    Raises:
        ValueError: No such list, or nothing of a name in it.
    """
    if options.what not in KINDS:
        raise ValueError(unknown("list", options.what, KINDS))
    rows = listing(options.what)
    if options.what == "parts":
        from lightning_kv.policies.plugins import imported

        rows += [part_row(name, imported(name)) for name in options.names if ":" in name]
        refuse_methods(options.names)
    rows = only(options.names, rows)
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    elif options.what in ("heads", "models", "parts", "policies"):
        show_blocks(rows)
    else:
        show_table(rows)


def only(names: list[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are named; all where none is.

    Raises:
        ValueError: Nothing is called so.
    """
    known = {next(iter(row.values())) for row in rows}
    for name in names:
        if name not in known:
            raise ValueError(unknown("entry", name, sorted(known)))
    return [row for row in rows if not names or next(iter(row.values())) in names]


def show_table(rows: list[dict[str, Any]]) -> None:
    """One line for each."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(rows[0]):
        table.add_column(name, overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console().print(table)


def show_blocks(rows: list[dict[str, Any]]) -> None:
    """A paragraph for each: its name, what it is, and the rest below, ready to be copied."""
    from rich.text import Text

    out = console()
    for row in rows:
        (_, name), (_, about), *rest = row.items()
        out.print(Text.assemble((name, "bold"), "  ", about), soft_wrap=True)
        lines = {k: v for k, v in rest if not isinstance(v, dict)}
        for _, value in rest:
            lines |= value if isinstance(value, dict) else {}
        width = max(9, *map(len, lines))
        for label, value in lines.items():
            value = ("no", "yes")[value] if isinstance(value, bool) else value
            out.print(Text(f"    {label:{width}} {value}"), soft_wrap=True)


def refuse_methods(names: list[str]) -> None:
    """Say which parts a published method has where it is taken for one.

    Raises:
        ValueError: A name is a method's and no part's.
    """
    from lightning_kv.policies.part import PARTS
    from lightning_kv.policies.registry import presets

    for name in names:
        if name in presets() and not any(name in own for own in PARTS.values()):
            made = made_of(presets()[name]) or "retain: everything, select: everything"
            words = " ".join(dict.fromkeys(each.split(": ")[1] for each in made.split(", ")))
            raise ValueError(
                f"{name!r} is no part but a published method. It is made of {made}. "
                f"Try `lightning-kv list parts {words}`, or `lightning-kv list policies {name}`."
            )


KINDS = ("policies", "parts", "heads", "models", "metrics")


def listing(what: str) -> list[dict[str, Any]]:
    """Rows about one of :data:`KINDS`."""
    every = {"policies": policies, "parts": parts, "heads": heads}
    return (every | {"models": models, "metrics": metrics})[what]()


def policies() -> list[dict[str, Any]]:
    """The named presets and the parts they are made of."""
    from lightning_kv.policies.registry import preset, presets

    rows = []
    for name, own in presets().items():
        rows.append(
            {
                "policy": name,
                "about": own.about,
                "paper": own.paper or "-",
                "saves": " and ".join(own.saves) or "-",
                "parts": made_of(own) or "-",
                "published": own.defaults or "-",
                "needs": needed(made := preset(name)),
                "deployable": not made.needs,
            }
        )
    return rows


def made_of(method: Any) -> str:
    """The parts of a published method that differ from the full cache."""
    from lightning_kv.policies.registry import DEFAULTS

    told = []
    for kind, own in method.parts.items():
        settings = own if isinstance(own, dict) else {"part": own}
        told.append(f"{kind}: {settings.get('part', DEFAULTS[kind])}")
        if isinstance(budget := settings.get("budget"), dict) and "part" in budget:
            told.append(f"budget: {budget['part']}")
    return ", ".join(told)


INPUTS = {"pose": "the camera's pose"}
"""Side inputs that a rollout must bring, in words."""


def needed(policy: Any) -> str:
    """What a policy wants beside a prompt: a rollout, side inputs, numbers or words for heads."""
    told = ["a reference rollout"] if policy.needs else []
    told += [f"{INPUTS.get(name, name)} (inputs)" for name in policy.inputs]
    return ", ".join(dict.fromkeys([*told, *tables(policy)])) or "-"


def tables(policy: Any) -> list[str]:
    """Head tables and scorers of a policy, each with the models that it is shipped for."""
    from lightning_kv.policies.scorer.artifact import ScorerFile, shipped_scorers
    from lightning_kv.policies.tables import HeadTable, shipped

    told = []
    for part in policy.parts:
        for each in (getattr(part, own.name) for own in dataclasses.fields(part)):
            if isinstance(each, ScorerFile) and each.file == "auto":
                models = ", ".join(shipped_scorers())
                told.append(f"a scorer of the model (shipped for: {models or 'none'})")
            if isinstance(each, HeadTable) and each.file:
                fit = [
                    table
                    for name, table in shipped().items()
                    if each.file == name or table.method in each.auto.split()
                ]
                models = ", ".join(dict.fromkeys(name for table in fit for name in table.models))
                words = all(isinstance(value, str) for value in each.values)
                what = "head labels" if words else "numbers for heads"
                told.append(f"{what} of the model (shipped for: {models or 'none'})")
    return told


def parts() -> list[dict[str, Any]]:
    """Every part, by kind: what free combinations are made of, and what each setting means."""
    from lightning_kv.policies.part import PARTS
    from lightning_kv.policies.registry import discover

    discover()
    return [part_row(name, cls) for known in PARTS.values() for name, cls in sorted(known.items())]


def part_row(name: str, cls: Any) -> dict[str, Any]:
    """One part: its name or address, what it does, its kind and its settings."""
    about = (cls.__doc__ or "-").strip().splitlines()[0]
    row: dict[str, Any] = {"part": name, "about": about, "kind": cls.kind}
    return row | ({"settings": found} if (found := part_settings(cls)) else {})


def part_settings(cls: type) -> dict[str, str]:
    """What each setting of a part means, as its docstrings say, and its default."""
    told = meanings(cls)
    return {
        field.name: f"{told.get(field.name, '-')} [{shown(field)}]"
        for field in dataclasses.fields(cls)
        if field.name != "budget" or cls.limited
    }


def shown(field: Any) -> str:
    """The default of a setting as one writes it in YAML."""
    value = field.default
    if getattr(value, "file", None) == "auto":  # the table of the model
        return "auto"
    if value is dataclasses.MISSING or dataclasses.is_dataclass(value):  # an empty table
        return "null" if getattr(value, "optional", False) else "needed"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def heads() -> list[dict[str, Any]]:
    """The shipped tables with a label or a number for each head: of which model, and from where."""
    from collections import Counter

    from lightning_kv.policies.tables import shipped

    rows = []
    for name, own in shipped().items():
        values = [value for row in own.rows for value in row]
        count = ", ".join(f"{n} {word}" for word, n in Counter(values).most_common())
        if not isinstance(values[0], str):
            count = f"from {min(values):.5g} to {max(values):.5g}"
        rows.append(
            {
                "table": name,
                "about": f"{own.about.rstrip('.')}.",
                "models": ", ".join(own.models),
                "method": own.method,
                "heads": f"{len(own.rows)} layers of {len(own.rows[0])}: {count}",
                "source": own.source,
            }
        )
    return rows


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
            "size": "download not measured" if one.size is None else format_bytes(one.size),
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
    return rows + derived()


def derived() -> list[dict[str, Any]]:
    """Metrics that a clip has where others are measured: computed from those, never named."""
    from lightning_kv.runs.derived import DERIVED

    better = {True: "higher", False: "lower", None: "neither"}
    return [
        {
            "metric": each.name,
            "unit": each.facts["unit"] or "-",
            "better": better[each.facts["higher_is_better"]],
            "needs": f"derived from {', '.join(each.needs)}",
            "weights": "those of these",
        }
        for each in DERIVED
    ]


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


COMMAND = Command(
    "list",
    ListOptions,
    run,
    """\
examples:
  lightning-kv list policies
  lightning-kv list models
  lightning-kv list metrics
  lightning-kv list parts window importance    the meaning of each setting
  lightning-kv list heads                      tables that are shipped for models
  lightning-kv list parts --json""",
    positional={"what": "WHAT", "names": "NAME"},
)
