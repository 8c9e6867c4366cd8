"""Commands. The only place that knows all the others; heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv import __version__
from lightning_kv.arguments import Words, hint, parse

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """\
usage: lightning-kv COMMAND [options]

Which KV-cache policy for an autoregressive video diffusion model, at what budget, and what does it
cost in quality?

commands:
  evaluate   roll out the reference and every policy from the same prompts and noise, and compare
  recommend  which policy to run, from a run's results: what it saves, what it costs, how sure
  report     write report.html again, of one run or several, finished or not
  inspect    the same in the terminal
  generate   one video from a prompt, and what its cache cost
  pretrain   train the embedded panorama model
  list       policies, parts, models or metrics that are there

  lightning-kv COMMAND --help    says more
  lightning-kv --version

example:
  lightning-kv evaluate -c configs/quickstart.yaml
  lightning-kv recommend runs/quickstart
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error is said in words and gives exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "evaluate": evaluate_command,
        "recommend": recommend_command,
        "report": report_command,
        "inspect": inspect_command,
        "generate": generate_command,
        "pretrain": pretrain_command,
        "list": list_command,
    }
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if words[0] == "--version":
        sys.stdout.write(f"lightning-kv {__version__}\n")
        return
    if words[0] not in commands:
        fail(f"No command {words[0]!r}.{hint(words[0], commands)} Commands: {', '.join(commands)}.")
    try:
        commands[words[0]](words[1:])
    except ValueError as error:
        fail(str(error))


def fail(text: str) -> None:
    """Say what is wrong and stop."""
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)


def evaluate_command(words: list[str]) -> None:
    """`lightning-kv evaluate`."""
    from lightning_kv.tasks.options import EvaluateOptions

    options = parse("evaluate", EvaluateOptions, words)
    from lightning_kv.tasks.evaluate import evaluate

    quiet()
    summary = evaluate(options)
    if summary:
        from lightning_kv.report.records import RunDirectory
        from lightning_kv.report.table import render_tables
        from lightning_kv.tasks.recommend import verdict

        run, out = RunDirectory(options.out), console()
        out.print(render_tables(summary))
        say(out, verdict(summary, run.records()))
        out.print(
            f"Results are in {run.path}: {run.report.name}, summary.json, records/, videos/, "
            "traces/",
            soft_wrap=True,
        )


def recommend_command(words: list[str]) -> None:
    """`lightning-kv recommend`."""
    parser = Words("recommend", "Which policy to run, from what an evaluation has measured.")
    add_run(parser)
    parser.add_argument(
        "--memory", metavar="BYTES", help="most that the cache of one clip may take, such as 24GiB"
    )
    parser.add_argument(
        "--margin", metavar="METRIC=LOSS,...", help="largest loss that is allowed: recall=0.02"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.margins import read_margins, read_memory
    from lightning_kv.tasks.overview import open_run, summary_of
    from lightning_kv.tasks.recommend import recommend

    memory, margins = read_memory(chosen.memory), read_margins(chosen.margin)
    run = open_run(chosen.run)
    found = recommend(summary_of(run, intervals=False), run.records(), memory, margins)
    if chosen.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n")
        return
    say(console(), found.words)


def report_command(words: list[str]) -> None:
    """`lightning-kv report`."""
    parser = Words("report", "Write the page about one run or several, finished or not.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run directory that evaluate made"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="HTML file; report.html in the run directory"
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --out")
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.overview import open_run, page_path, summary_of, write_report

    out = page_path(chosen.runs, chosen.out, chosen.force)
    runs = [open_run(path) for path in chosen.runs]
    write_report(out, runs, [summary_of(run) for run in runs])
    sys.stdout.write(f"The report is {out}\n")


def inspect_command(words: list[str]) -> None:
    """`lightning-kv inspect`."""
    parser = Words("inspect", "A run's report in the terminal, finished or not.")
    add_run(parser)
    chosen = parser.parse_args(words)
    from lightning_kv.report.inspect import render_inspection
    from lightning_kv.tasks.overview import open_run, summary_of
    from lightning_kv.tasks.recommend import verdict

    run = open_run(chosen.run)
    summary, out = summary_of(run), console()
    say(out, verdict(summary, run.records()))
    out.print(render_inspection(run, summary))


def generate_command(words: list[str]) -> None:
    """`lightning-kv generate`."""
    from lightning_kv.tasks.options import GenerateOptions

    parser = Words("generate", "One video from a prompt alone, and what its cache cost.")
    kinds = {field.name: field.default for field in dataclasses.fields(GenerateOptions)}
    parser.add_argument("prompt", metavar="PROMPT", help="what the model is told")
    parser.add_argument(
        "-o", "--out", metavar="FILE", type=Path, required=True, help="the video, an .mp4 file"
    )
    parser.add_argument(
        "--prompt",
        dest="switches",
        metavar="TEXT@SECONDS",
        action="append",
        default=[],
        help="another prompt from there on, at the start of the chunk; may be repeated",
    )
    for name, kind, text in (
        ("model", str, "panorama, or a weights file that pretrain wrote"),
        ("policy", str, "a preset such as top-attention@9f, a YAML file, or parts in place"),
        ("seconds", float, "length, rounded up to whole chunks"),
        ("seed", int, "of the noise"),
        ("fps", float, "frames per second"),
        ("accelerator", str, "cpu, gpu, or auto: a CUDA GPU if there is one"),
    ):
        text = f"{text} ({kinds[name]})"
        parser.add_argument(
            f"--{name}", type=kind, metavar=name.upper(), default=kinds[name], help=text
        )
    parser.add_argument("--force", action="store_true", help="replace the video if it exists")
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.generate import generate

    made = generate(GenerateOptions(**vars(chosen)))
    sys.stdout.write("\n".join((*made.words, *made.notes)) + "\n")


def pretrain_command(words: list[str]) -> None:
    """`lightning-kv pretrain`."""
    from lightning_kv.tasks.options import PretrainOptions

    options = parse("pretrain", PretrainOptions, words)
    from lightning_kv.tasks.pretrain import pretrain

    quiet()
    sys.stdout.write(f"Weights are in {pretrain(options)}\n")


def list_command(words: list[str]) -> None:
    """`lightning-kv list`."""
    from lightning_kv.listing import KINDS, listing

    parser = Words("list", "What is there to choose from.")
    parser.add_argument("what", metavar="WHAT", help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    if chosen.what not in KINDS:
        near = hint(chosen.what, KINDS)
        raise ValueError(f"Cannot list {chosen.what!r}.{near} Lists: {', '.join(KINDS)}.")
    rows = listing(chosen.what)
    if chosen.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console().print(table)


def add_run(parser: Words) -> None:
    """The one run that a command is about."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory that evaluate made")


def console() -> Console:
    """Standard output, 120 columns wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def say(out: Any, sentences: Sequence[str]) -> None:
    """Sentences as a list, the first one bold."""
    from rich.text import Text

    for index, sentence in enumerate(sentences):
        out.print(Text(sentence, "" if index else "bold"))
    out.print()


def quiet() -> None:
    """Keep Lightning's start-up notes to what a user must know (its import sets the levels)."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "does not have many workers",  # worlds are drawn in no time
        "isinstance.treespec, LeafSpec",  # between lightning and torch
        "srun. command is available",
        "Checkpoint directory .* exists and is not empty",  # that is how a run goes on
        "was called before the ``update`` method",  # the reference has nothing to be compared with
        "no pre-optimization state was saved",  # the state after the step is the one wanted
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
