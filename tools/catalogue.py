"""Write docs/catalogue.md from the catalogue's runs; every statement in it is computed from them.

lightning-kv evaluate -c configs/catalogue.yaml
lightning-kv evaluate -c configs/catalogue_any_start.yaml
python tools/catalogue.py --close        # prints the commands that give the close ones 32 worlds
lightning-kv evaluate -c configs/catalogue_bytes.yaml
lightning-kv evaluate -c configs/catalogue_any_start_bytes.yaml
lightning-kv evaluate -c configs/catalogue_positions.yaml
lightning-kv evaluate -c configs/catalogue_any_start_positions.yaml
python tools/catalogue.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.registry import presets
from lightning_kv.policies.tables import shipped
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.units import metric_of, unit_means
from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.inference import holm, sign_flip_p

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 0.05  # of recall: near enough to the front for more worlds, and a loss that is small
CAMERA = 0.9  # of the frames follow the camera's rule; below, the world is seen from elsewhere
BYTES, READS, SCORED = "kv_bytes_peak", "kv_read_fraction", "kv_scored_fraction"
MET = "met"  # rows read, and those that are met to choose them
SETTINGS = {
    "catalogue": "The camera starts at the left wall: the given frames show the whole world",
    "catalogue_any_start": "The camera starts anywhere: much is first seen later",
}
SEEDS = ("focused-forcing", "future-forcing", "future-focused", "forcing-kv", "hfs")
RIVALS = (
    *("deep-forcing", "expected-attention", "tri-attention", "echo-forcing", "density-kv"),
    *("h2o", "snap-kv", "sliding-window", "random-memory", "oracle"),
)


@dataclass(frozen=True)
class Difference:
    """A paired difference of recall over worlds.

    Args:
        mean: Of the differences.
        interval: 95 %, of this comparison alone.
        p: Two-sided, corrected for all comparisons of its list.
        n: Worlds.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    n: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:+.3f} [{low:+.3f}, {high:+.3f}]"

    @property
    def sure(self) -> bool:
        """Whether it is no chance, all comparisons of its list together at 5 %."""
        return self.p <= 0.05


class Run:
    """A finished run.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = json.loads((folder / "summary.json").read_text())

    @cached_property
    def recall(self) -> dict[str, dict[str, float]]:
        """Recall of every policy by world."""
        clips: dict[str, list] = {}
        for record in RunDirectory(self.folder).records():
            clips.setdefault(record["policy"], []).append(record)
        return {name: unit_means(own, metric_of("recall")) for name, own in clips.items()}

    @property
    def hindsight(self) -> list[str]:
        """Policies that know what is to come."""
        return self.summary["run"]["hindsight"]

    @property
    def names(self) -> list[str]:
        """All policies, the reference first."""
        return list(self.summary["policies"])

    def mean(self, name: str) -> float:
        """Recall."""
        own = self.recall[name]
        return math.fsum(own.values()) / len(own)

    def camera(self, name: str) -> float | None:
        """How well the camera keeps its rule, from 0 to 1; None where that was not measured."""
        return self.summary["policies"][name]["metrics"].get("camera_rule", {}).get("mean")

    def interval(self, name: str) -> tuple[float, float]:
        """Of the mean."""
        return bca_interval(list(self.recall[name].values()))

    def cost(self, name: str, axis: str) -> float:
        """Of a policy, by an axis."""
        if axis == MET:
            return self.cost(name, READS) + self.cost(name, SCORED)
        return self.summary["policies"][name]["cost"][axis]

    def on_front(self, name: str, axis: str) -> float | None:
        """How probably it is on the front of recall and an axis; None for hindsight."""
        found = self.summary["pareto"]["recall"][axis].get(name)
        return None if found is None else found["p"]

    def gap(self, name: str, axis: str) -> float:
        """Recall below the best policy that costs no more."""
        cost = self.cost(name, axis)
        rivals = [n for n in self.names if n not in self.hindsight and self.cost(n, axis) <= cost]
        return max(self.mean(rival) for rival in rivals) - self.mean(name)

    def close(self) -> list[str]:
        """Policies within a small loss of the front of bytes or of reads."""
        own = [name for name in self.names if name not in self.hindsight]
        return [n for n in own if min(self.gap(n, BYTES), self.gap(n, READS)) <= CLOSE]

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[Difference]:
        """Of recall, first minus second, for a list of comparisons."""
        found = []
        for first, second in pairs:
            a, b = self.recall[first], self.recall[second]
            found.append([a[unit] - b[unit] for unit in sorted(a.keys() & b.keys())])
        many = holm([sign_flip_p(values) for values in found])
        return [
            Difference(math.fsum(v) / len(v), bca_interval(v), p, len(v))
            for v, p in zip(found, many, strict=True)
        ]


def base_of(name: str) -> str:
    """The preset of ``NAME@BUDGET``."""
    return name.partition("@")[0]


def budget_of(name: str) -> str:
    """The budget of ``NAME@BUDGET``, empty where it has none."""
    return name.partition("@")[2]


def saves(name: str) -> tuple[str, ...]:
    """What a preset saves: memory, reads."""
    own = presets().get(base_of(name))
    return own.saves if own else ()


def savers(run: Run, what: str) -> list[str]:
    """Methods that save memory, or that only read less, at all their budgets; controls left out.

    Args:
        run: Their run.
        what: ``memory`` or ``reads``.
    """
    controls = ("random-memory", "sliding-window", "sink-window", "random", "top-attention")
    found = []
    for name in run.names:
        method = base_of(name).removesuffix("-last3")
        own = presets().get(method)
        if own and method not in controls and name not in run.hindsight:
            kind = "memory" if "memory" in own.saves else "reads"
            found += [name] * (kind == what and kind in own.saves)
    return found


# -- tables ----------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview(run: Run) -> str:
    """All policies, the best first."""
    names = sorted(run.names, key=lambda name: -run.mean(name))
    losses = run.differences([(name, run.summary["reference"]) for name in names])
    rows = []
    for name, loss in zip(names, losses, strict=True):
        low, high = run.interval(name)
        sure = [run.on_front(name, axis) for axis in (BYTES, READS)]
        rows.append(
            [
                f"`{name}`",
                f"{run.mean(name):.3f} [{low:.3f}, {high:.3f}]",
                "-" if name == run.summary["reference"] else str(loss),
                shown_camera(run.camera(name)),
                f"{run.cost(name, BYTES) / 2**20:.2f}",
                f"{100 * run.cost(name, READS):.0f} %",
                f"{100 * run.cost(name, SCORED):.0f} %",
                *("knows the future" if p is None else f"{100 * p:.0f} %" for p in sure),
            ]
        )
    head = ["policy", "recall", "against full", "camera", "MiB", "reads", "scored"]
    return table([*head, "P(front, bytes)", "P(front, reads)"], rows)


def shown_camera(kept: float | None) -> str:
    """How well the camera keeps its rule; where it is lost, recall says little about memory."""
    if kept is None:
        return "-"
    return f"{kept:.2f}" if kept >= CAMERA else f"{kept:.2f}, lost"


def duel_rows(run: Run, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """One line for each comparison."""
    return [
        [f"`{a}`", f"`{b}`", str(d), "yes" if d.sure else "no"]
        for (a, b), d in zip(pairs, run.differences(pairs), strict=True)
    ]


def duels(run: Run, pairs: Sequence[tuple[str, str]]) -> str:
    """Comparisons as a table."""
    return table(["policy", "against", "recall", "sure"], duel_rows(run, pairs))


# -- readings --------------------------------------------------------------------------------


def quoted(names: Iterable[str]) -> str:
    """Names in a sentence."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def amount(run: Run, name: str, axis: str) -> str:
    """What a policy costs, in words."""
    if axis == BYTES:
        return f"{run.cost(name, BYTES) / 2**20:.2f} MiB"
    scored = round(100 * run.cost(name, SCORED))
    chosen = f", and meets {scored} % to choose" if scored else ""
    return f"{100 * run.cost(name, READS):.0f} %{chosen}"


def what_to_run(run: Run) -> list[str]:
    """The cheapest policies that lose little for sure, and the best at each budget."""
    reference, lines = run.summary["reference"], []
    own = [n for n in run.names if n not in run.hindsight and n != reference]
    losses = dict(zip(own, run.differences([(n, reference) for n in own]), strict=True))
    for axis, word in ((BYTES, "bytes"), (MET, "reads")):
        sure = [n for n in own if losses[n].interval[0] >= -CLOSE]
        saving = [n for n in sure if run.cost(n, axis) < run.cost(reference, axis)]
        best = sorted(saving, key=lambda n: run.cost(n, axis))[:3]
        if not best:
            lines.append(
                f"- To save {word}: no policy here stays within {CLOSE} of the full cache's recall "
                "with its whole interval."
            )
        for name in best:
            lines.append(
                f"- To save {word}: `{name}` takes {amount(run, name, axis)} (full: "
                f"{amount(run, reference, axis)}) at {losses[name]} of recall."
            )
    for budget in ("6f", "9f", "15f"):
        at = [n for n in savers(run, "memory") if budget_of(n) == budget]
        at.sort(key=lambda n: -run.mean(n))
        first = [f"`{n}` {run.mean(n):.3f} ({losses[n]} against full)" for n in at[:3]]
        if first:
            lines.append(f"- Best memories of {budget}: {'; '.join(first)}.")
    return lines


def against(run: Run, rival: str, what: str = "memory") -> list[str]:
    """How the methods that save memory, or reads, stand against one control at the same budget."""
    pairs = [
        (name, f"{rival}@{budget_of(name)}")
        for name in savers(run, what)
        if f"{rival}@{budget_of(name)}" in run.names
    ]
    if not pairs:
        return []
    found = list(zip(pairs, run.differences(pairs), strict=True))
    better, worse = (sum(d.sure and sign * d.mean > 0 for _, d in found) for sign in (1, -1))
    by_method: dict[str, dict[str, tuple[Difference, str]]] = {}
    for (name, _), difference in found:
        lost = " (lost)" * ((run.camera(name) or 1) < CAMERA)
        told = f"**{difference}**" if difference.sure else str(difference)
        by_method.setdefault(base_of(name), {})[budget_of(name)] = difference, told + lost
    budgets = list(dict.fromkeys(budget_of(name) for name, _ in pairs))
    order = sorted(by_method, key=lambda name: -max(d.mean for d, _ in by_method[name].values()))
    rows = [
        [f"`{name}`", *(by_method[name].get(budget, (None, ""))[1] for budget in budgets)]
        for name in order
    ]
    undecided, worlds = len(found) - better - worse, found[0][1].n
    return [
        f"Of {len(found)} comparisons at equal budgets, {better} are better than `{rival}`, "
        f"{worse} worse, {undecided} undecided (sign-flip tests over {worlds} worlds, Holm over "
        "the list, 5 %). Decided ones are bold, the best of each method counts for the order, and "
        "where the camera is lost it is said.",
        "",
        table(["recall of", *budgets], rows),
    ]


def seeds(run: Run) -> list[str]:
    """Where the methods this package started from stand."""
    found = []
    for name in (n for n in run.names if base_of(n) in SEEDS):
        word, axis = ("bytes", BYTES) if "memory" in saves(name) else ("keys met", MET)
        cost, own = run.cost(name, axis), base_of(name)
        rivals = [
            n
            for n in run.names
            if n not in run.hindsight and base_of(n) != own and run.cost(n, axis) <= cost
        ]
        if rivals:
            found.append((name, max(rivals, key=run.mean), word, len(rivals)))
    differences = run.differences([own[:2] for own in found])
    rows = [
        [f"`{name}`", word, f"`{best}`", str(count), f"**{d}**" if d.sure else str(d)]
        for (name, best, word, count), d in zip(found, differences, strict=True)
    ]
    about = (
        "Each against the best of all other policies that cost no more: in bytes where it saves "
        "memory, else in keys met, to be read or to be chosen. Bold: sure."
    )
    head = ["policy", "costs no more", "the best of them", "of so many", "recall"]
    return [about, "", table(head, rows)]


def equal_bytes(run: Run) -> str:
    """Future Forcing against its rivals at the same number of bytes."""
    pairs, said = [], []
    for budget in dict.fromkeys(map(budget_of, run.names)):
        if not budget:
            continue
        own = [name for name in run.names if budget_of(name) == budget]
        peaks = {name: run.cost(name, BYTES) for name in own}
        above = [name for name in own if peaks[name] > Amount.parse(budget).value]
        said.append(
            f"- {budget}: peaks from {min(peaks.values()) / 2**20:.2f} to "
            f"{max(peaks.values()) / 2**20:.2f} MiB; above it: {quoted(above)}."
        )
    for mine in (n for n in run.names if base_of(n) == "future-forcing"):
        rivals = (f"{rival}@{budget_of(mine)}" for rival in RIVALS)
        pairs += [(mine, rival) for rival in rivals if rival in run.names]
    about = (
        "The budget is of the cache: rows, their columns, state, and the chunk in flight. What is "
        "above it is the buffer for one layer's keys when they are turned for a read."
    )
    return "\n".join([about, "", *said, "", duels(run, pairs)])


def crossing(run: Run) -> str:
    """Absolute against contiguous positions of every memory."""
    names = [name for name in run.names if "-contiguous" in name]
    twins = [[name.replace("-contiguous", x) for x in ("-absolute", "")] for name in names]
    pairs = [
        (next(twin for twin in own if twin in run.names), name)
        for own, name in zip(twins, names, strict=True)
    ]
    rows = [
        [f"`{a}`", f"{run.mean(a):.3f}", f"{run.mean(b):.3f}", str(d), "yes" if d.sure else "no"]
        for (a, b), d in zip(pairs, run.differences([(b, a) for a, b in pairs]), strict=True)
    ]
    return table(["policy", "absolute", "contiguous", "difference", "sure"], rows)


# -- the document ----------------------------------------------------------------------------


def found_run(name: str) -> Run | None:
    """A run, if it is there."""
    folder = ROOT / "runs" / name
    return Run(folder) if (folder / "summary.json").is_file() else None


def section(name: str, about: str) -> list[str]:
    """All that is said about one setting."""
    run = found_run(name)
    if run is None:
        return [f"## {about}", "", f"Not run yet: `lightning-kv evaluate -c configs/{name}.yaml`."]
    worlds = run.summary["run"]["prompts"]
    lines = [f"## {about}", "", f"`lightning-kv evaluate -c configs/{name}.yaml`, {worlds} worlds."]
    lines += ["", "### What to run", "", *what_to_run(run)]
    lines += ["", "### Where the seeds stand", "", *seeds(run)]
    lines += ["", "### Memories against random memory", "", *against(run, "random-memory")]
    lines += ["", "### Reads against random reads", "", *against(run, "random", "reads")]
    lines += ["", "### Memories against a sliding window", "", *against(run, "sliding-window")]
    for suffix, title, made in (
        ("close", "The close ones on 32 worlds", overview),
        ("bytes", "Future Forcing at equal bytes", equal_bytes),
        ("positions", "Absolute against contiguous positions", crossing),
    ):
        other = found_run(f"{name}_{suffix}")
        if other is not None:
            lines += ["", f"### {title}", "", made(other)]
    return [*lines, "", "### All policies", "", overview(run)]


INTRODUCTION = """# The catalogue: every published cache policy on one model

Written by `python tools/catalogue.py` from the runs named below; nothing here is typed by hand.
The embedded panorama model (72 latent frames, 15 given, 24 for the way there and back) rolls out
every preset at budgets of 6, 9 and 15 history frames, from the same worlds and the same noise.
**recall** is the share of the content of places seen before that is right (1 is perfect),
**camera** the share of frames in which it moves as it must (where it is **lost**, recall says
little about memory: motion shows in three latent frames of this world, in one of Wan's), **MiB**
the peak of the whole cache, **reads** the history rows attended to and **scored** those touched to
choose, both as shares of the full cache's reads. Differences are paired by world; the brackets are
95 % intervals of each comparison alone, and **sure** says that a sign-flip test holds at 5 % over
its whole list (Holm). **P(front)** is how often a policy is on the front of recall and cost when
the worlds are drawn anew; the front of reads does not count what is scored, so that
`top-attention`, which meets every key to choose the best, bounds what choosing cheaply can reach.
The world is small and made to punish forgetting: it says which methods keep what must be kept, not
how films look. "The best of" others was chosen on the same worlds, which flatters it. Methods
that tell heads apart do so by labels of this model ({labels}); where a kind is
rare, little of the method is at work. DeCoPrune's passes over given frames are not counted.
"""


def labels() -> str:
    """How many heads of the embedded model each labelling has of each kind."""
    told = []
    for own in shipped().values():
        if "panorama" in own.models:
            heads = [label for row in own.rows for label in row if isinstance(label, str)]
            counts = ", ".join(f"{heads.count(kind)} {kind}" for kind in sorted(set(heads)))
            told += [f"`{own.method}`: {counts}"] if heads else []
    return "; ".join(told)


def document() -> str:
    """The whole page."""
    parts = ["\n".join(section(name, about)) for name, about in SETTINGS.items()]
    return INTRODUCTION.format(labels=labels()) + "\n" + "\n\n".join(parts) + "\n"


def close_commands() -> list[str]:
    """What gives the policies near the front more worlds."""
    lines = []
    for name in SETTINGS:
        run = found_run(name)
        if run is not None:
            config = yaml.safe_load((run.folder / "config.yaml").read_text())
            made = {own["name"]: own for own in config["policies"] if isinstance(own, dict)}
            chosen = json.dumps([made.get(own, own) for own in run.close()])
            lines.append(
                f"lightning-kv evaluate -c configs/{name}.yaml --prompts 32 --budgets null "
                f"--policies '{chosen}' --out runs/{name}_close"
            )
    return lines


def main() -> None:
    """Write the page, or print commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--close", action="store_true", help="print the commands for 32 worlds")
    if parser.parse_args().close:
        sys.stdout.write("\n".join(close_commands()) + "\n")
        return
    (ROOT / "docs" / "catalogue.md").write_text(document())


if __name__ == "__main__":
    main()
