"""Write the tables of README.md again, from run directories and from what is in the package.

lightning-kv evaluate -c configs/quickstart.yaml
lightning-kv evaluate -c configs/evaluate.yaml
lightning-kv evaluate -c configs/focused_forcing.yaml
lightning-kv evaluate -c configs/future_forcing.yaml
lightning-kv evaluate -c configs/future_ablation.yaml
lightning-kv evaluate -c configs/start_anywhere.yaml
lightning-kv evaluate -c configs/oracle.yaml
lightning-kv evaluate -c configs/oracle_any.yaml
python tools/readme_tables.py
"""

import json
import re
from pathlib import Path

from lightning_kv.commands.list import policies
from lightning_kv.policies.part import PRESETS
from lightning_kv.policies.plugins import HOME
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.units import metric_of, unit_means
from lightning_kv.stats.bootstrap import paired_interval

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("recall", "revisit_error", "psnr", "ruler_error")
SHORT = ("recall", "revisit_error", "psnr")
RUNS = {
    "quickstart": COLUMNS,
    "evaluate": COLUMNS,
    "focused_forcing": SHORT,
    "future_forcing": SHORT,
    "future_ablation": SHORT,
    "start_anywhere": SHORT,
    "oracle": SHORT,
    "oracle_any": SHORT,
}


def policy_table() -> str:
    """The presets of this package, one row each."""
    rows = ["| policy | what it does | saves | parts that differ from `full` |", "|---" * 4 + "|"]
    for row in policies():
        if not PRESETS[row["policy"]][1].__module__.startswith(HOME):
            continue  # of another package that is installed here
        paper = "" if row["paper"] == "-" else f" ({row['paper']})"
        about = row["about"].removesuffix(".") + paper + "."
        rows.append(f"| `{row['policy']}` | {about} | {row['saves']} | {row['parts']} |")
    return "\n".join(rows)


def run_table(run: Path, metrics: tuple[str, ...]) -> str:
    """Quality and cost of a run's policies."""
    summary = json.loads((run / "summary.json").read_text())
    head = [f"{name} {_arrow(summary, name)}" for name in metrics]
    losses = _losses(run, summary) if metrics is SHORT else {}
    behind = _behind(run, summary)
    head += ["loss ↓"] if losses else []
    head += ["behind ↓"] if behind else []
    head = ["policy", *head, "KV peak", "reads", "scored", "ms per chunk"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, policy in summary["policies"].items():
        cost = policy["cost"]
        cells = [f"`{name}`", *(_cell(policy["metrics"][metric]) for metric in metrics)]
        cells += [losses[name]] if losses else []
        cells += [behind[name]] if behind else []
        cells += [
            f"{cost['kv_bytes_peak'] / 2**20:.2f} MiB",
            f"{100 * cost['kv_read_fraction']:.0f} %",
            f"{100 * cost['kv_scored_fraction']:.0f} %",
            f"{1000 * cost['seconds_per_chunk_p50']:.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _recall(run: Path) -> dict[str, dict[str, float]]:
    """Recall by policy and prompt."""
    clips: dict[str, list] = {}
    for record in RunDirectory(run).records():
        clips.setdefault(record["policy"], []).append(record)
    return {name: unit_means(own, metric_of("recall")) for name, own in clips.items()}


def _losses(run: Path, summary: dict) -> dict[str, str]:
    """Recall below the reference, paired by prompt, with its interval."""
    recall = _recall(run)
    return {name: _below(recall, name, summary["reference"]) for name in recall}


def _behind(run: Path, summary: dict) -> dict[str, str]:
    """Recall below the oracle of the same budget, where the run has one."""
    recall = _recall(run)
    best = {name: f"oracle@{name.partition('@')[2]}" for name in recall}
    if "oracle@9f" not in recall:
        return {}
    return {n: _below(recall, n, best[n]) if best[n] in recall else "-" for n in recall}


def _below(recall: dict[str, dict[str, float]], name: str, best: str) -> str:
    if name == best:
        return "-"
    own, base = recall[name], recall[best]
    keys = sorted(base)
    mean = sum(base[key] - own[key] for key in keys) / len(keys)
    low, high = paired_interval([base[key] for key in keys], [own[key] for key in keys])
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _arrow(summary: dict, metric: str) -> str:
    first = next(iter(summary["policies"].values()))
    return "↑" if first["metrics"][metric]["higher_is_better"] else "↓"


def _cell(metric: dict) -> str:
    if metric["mean"] is None:
        return "n/a"
    style = ".1f" if metric["unit"] == "dB" else ".3f" if metric["mean"] >= 0.01 else ".1e"
    mean, low, high = (format(x, style) for x in (metric["mean"], *metric["ci95"]))
    return mean if mean == low == high else f"{mean} [{low}, {high}]"


def fill(text: str, name: str, table: str) -> str:
    """Put a table between its two marks."""
    marks = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
    return re.sub(marks, f"<!-- {name} -->\n{table}\n<!-- /{name} -->", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite README.md; tables of runs that are not there stay as they are."""
    path = ROOT / "README.md"
    text = fill(path.read_text(), "policies", policy_table())
    for name, metrics in RUNS.items():
        if (ROOT / "runs" / name / "summary.json").is_file():
            text = fill(text, name, run_table(ROOT / "runs" / name, metrics))
    path.write_text(text)


if __name__ == "__main__":
    main()
