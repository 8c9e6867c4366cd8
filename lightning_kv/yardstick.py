"""Commands around measurements: compare videos, check a run against an earlier one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from lightning_kv.arguments import Words
from lightning_kv.terminal import console, quiet, say, tell
from lightning_kv.workshop import add_license


def compare_command(words: list[str]) -> None:
    """`lightning-kv compare`; exit code 1 where a video was skipped."""
    from lightning_kv.tasks.options import CompareOptions

    chosen = vars(compare_words().parse_args(words))
    folders, metrics = chosen.pop("folders"), chosen.pop("metrics")
    options = CompareOptions(
        reference=folders[0] if folders else None,
        candidates=tuple(folders[1:]),
        metrics=None if metrics is None else tuple(read_list(metrics)),
        size="resize" if chosen.pop("resize") else "equal",
        **chosen,
    )
    from lightning_kv.commands.compare import compare
    from lightning_kv.report.table import render_tables
    from lightning_kv.runs.verdict import verdict

    quiet()
    found, out = compare(options), console()
    if not found.summary:  # another rank tells
        return
    out.print(render_tables(found.summary))
    say(out, verdict(found.summary, found.run.records()))
    if notes := [*found.notes, *(f"Skipped: {why}" for why in found.skipped)]:
        tell(notes)
    out.print(f"Results are in {found.run.path}: {found.run.report.name}, summary.json, records/")
    if found.skipped:
        raise SystemExit(1)


def compare_words() -> Words:
    """What can be typed after `compare`."""
    parser = Words("compare", "The metrics and statistics of a run, for videos you already have.")
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="*", type=Path, help="reference, then candidates"
    )
    parser.add_argument(
        "-o", "--out", metavar="DIR", type=Path, required=True, help="run directory"
    )
    parser.add_argument(
        "--pairs", metavar="CSV", type=Path, help="pairs from a table: reference,candidate[,key]"
    )
    parser.add_argument(
        "--metrics", metavar="[A,B]", help="see `lightning-kv list metrics`; no weights by default"
    )
    parser.add_argument("--real", metavar="FOLDER", type=Path, help="real videos, for fvd and kvd")
    parser.add_argument(
        "--unpaired", action="store_true", help="names do not match: compare whole sets"
    )
    parser.add_argument(
        "--length", metavar="HOW", default="equal", help="equal, or shortest: cut all to that"
    )
    parser.add_argument(
        "--resize", action="store_true", help="bring candidates to the size of the reference"
    )
    parser.add_argument(
        "--fps", metavar="HOW", default="equal", help="equal, or ignore different frame rates"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first video that cannot be used"
    )
    parser.add_argument("--videos", metavar="N", type=int, default=3, help="moving pictures (3)")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="CPU threads (1)")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=0, help="processes that read ahead (0)"
    )
    parser.add_argument("--devices", metavar="N", help="processes (CPU) or GPUs (1)")
    add_license(parser)
    parser.add_argument(
        "--accelerator", metavar="NAME", default="auto", help="cpu, gpu, or auto (auto)"
    )
    return parser


def check_command(words: list[str]) -> None:
    """`lightning-kv check`; exit code 0 passed, 1 worse, 2 too few prompts (or an error)."""
    parser = Words("check", "Is a run worse than an earlier one by more than you allow?")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, or its summary.json")
    parser.add_argument(
        "--baseline", metavar="FILE", type=Path, required=True, help="summary.json of another run"
    )
    parser.add_argument(
        "--margin", metavar="METRIC=LOSS,...", help="largest loss that is allowed: recall=0.02"
    )
    parser.add_argument("--policies", metavar="[A,B]", help="which; all that both have")
    parser.add_argument(
        "--level", metavar="P", type=float, default=0.95, help="confidence of the verdict (0.95)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    from lightning_kv.runs.check import check
    from lightning_kv.runs.margins import read_margins

    policies = None if chosen.policies is None else read_list(chosen.policies)
    found = check(chosen.run, chosen.baseline, read_margins(chosen.margin), policies, chosen.level)
    if chosen.json:
        said = {"code": found.code, "words": found.words, **dataclasses.asdict(found)}
        sys.stdout.write(json.dumps(said, indent=1, allow_nan=False) + "\n")
    else:
        say(console(), found.words)
    raise SystemExit(found.code)


def read_list(text: str) -> list[str]:
    """Names from ``[a,b]`` or ``a,b``.

    >>> read_list("[psnr, fvd/i3d]"), read_list("psnr")
    (['psnr', 'fvd/i3d'], ['psnr'])
    """
    inside = text.strip().removeprefix("[").removesuffix("]")
    return [name.strip() for name in inside.split(",") if name.strip()]
