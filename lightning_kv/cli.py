"""Commands. The only place that knows all the others; heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_kv import __version__, workshop, yardstick
from lightning_kv.arguments import Words, hint, parse
from lightning_kv.terminal import console, fail, quiet, say, tell

USAGE = """\
usage: lightning-kv COMMAND [options]

Which KV-cache policy for an autoregressive video diffusion model, at what budget, and what does it
cost in quality?

commands:
  evaluate   roll out the reference and every policy from the same prompts and noise, and compare
  compare    the same metrics and statistics for videos that you already have
  check      is a run worse than an earlier one: a gate for continuous integration
  recommend  which policy to run, from a run's results: what it saves, what it costs, how sure
  report     write report.html again, of one run or several, finished or not
  inspect    the same in the terminal
  generate   one video from a prompt, and what its cache cost
  pretrain   train the embedded panorama model
  pretrain-encoder   train the encoder that its clips are compared with

  list       policies, parts, models or metrics that are there
  doctor     what works here: packages, devices, attention kernels, weights
  fetch      download a published checkpoint
  convert    a checkpoint under the names of the original or of diffusers
  encode     text states of a set of prompts, computed once
  decode     videos from latents that were kept
  export     the same under the folders and names that VBench reads

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
        "compare": yardstick.compare_command,
        "check": yardstick.check_command,
        "recommend": recommend_command,
        "report": report_command,
        "inspect": inspect_command,
        "generate": generate_command,
        "pretrain": pretrain_command,
        "pretrain-encoder": pretrain_encoder_command,
        "list": workshop.list_command,
        "doctor": workshop.doctor_command,
        "fetch": workshop.fetch_command,
        "convert": workshop.convert_command,
        "encode": workshop.encode_command,
        "decode": workshop.decode_command,
        "export": workshop.export_command,
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


def evaluate_command(words: list[str]) -> None:
    """`lightning-kv evaluate`."""
    from lightning_kv.tasks.options import EvaluateOptions

    options = parse("evaluate", EvaluateOptions, words)
    from lightning_kv.commands.evaluate import evaluate

    quiet()
    summary = evaluate(options)
    if summary:
        from lightning_kv.report.table import render_tables
        from lightning_kv.runs.directory import RunDirectory
        from lightning_kv.runs.verdict import verdict

        run, out = RunDirectory(options.out), console()
        out.print(render_tables(summary))
        say(out, verdict(summary, run.records()))
        out.print(
            f"Results are in {run.path}: {run.report.name}, report.md, table.tex, summary.json, "
            "records/, videos/, traces/",
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
    from lightning_kv.policies.budgets import read_memory
    from lightning_kv.runs.margins import read_margins
    from lightning_kv.runs.recommend import recommend
    from lightning_kv.tasks.overview import open_run, summary_of

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
    from lightning_kv.runs.verdict import verdict
    from lightning_kv.tasks.overview import open_run, summary_of

    run = open_run(chosen.run)
    summary, out = summary_of(run), console()
    say(out, verdict(summary, run.records()))
    out.print(render_inspection(run, summary))


def generate_command(words: list[str]) -> None:
    """`lightning-kv generate`."""
    from lightning_kv.tasks.options import GenerateOptions

    parser = Words("generate", "One video from a prompt alone, and what its cache cost.")
    parser.add_argument("prompt", metavar="PROMPT", help="what the model is told")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        required=True,
        help="the video, an .mp4 file; or its latents, a .safetensors file",
    )
    parser.add_argument(
        "--prompt",
        dest="switches",
        metavar="TEXT@SECONDS",
        action="append",
        default=[],
        help="another prompt from there on, at the start of the chunk; may be repeated",
    )
    kinds = {field.name: field.default for field in dataclasses.fields(GenerateOptions)}
    for name, kind, text in (
        ("model", str, "panorama, a published checkpoint, NAME=FILE, or a file (panorama)"),
        ("policy", str, "a preset such as top-attention@9f, a YAML file, or parts in place"),
        ("seconds", float, "length, rounded up to whole chunks"),
        ("seed", int, "of the noise (0)"),
        ("fps", float, "frames per second"),
        ("size", str, "HEIGHTxWIDTH in pixels"),
        ("negative", str, "negative prompt, for models with guidance"),
        ("precision", str, "float32, reference or fast"),
        ("text", Path, "folder of embeddings, or of tokenizer and text encoder"),
        ("vae", Path, "folder of the VAE"),
        ("threads", int, "CPU threads (1)"),
        ("accelerator", str, "cpu, gpu, or auto: a CUDA GPU if there is one (auto)"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, metavar=name.upper(), default=kinds[name], help=text
        )
    parser.add_argument("--force", action="store_true", help="replace the video if it exists")
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.generate import generate

    made = generate(GenerateOptions(**vars(chosen)))
    tell((*made.words, *made.notes))


def pretrain_command(words: list[str]) -> None:
    """`lightning-kv pretrain`."""
    from lightning_kv.tasks.options import PretrainOptions

    options = parse("pretrain", PretrainOptions, words)
    from lightning_kv.tasks.pretrain import pretrain

    quiet()
    sys.stdout.write(f"Weights are in {pretrain(options)}\n")


def pretrain_encoder_command(words: list[str]) -> None:
    """`lightning-kv pretrain-encoder`."""
    from lightning_kv.tasks.encoder_options import PretrainEncoderOptions

    options = parse("pretrain-encoder", PretrainEncoderOptions, words)
    from lightning_kv.tasks.pretrain_encoder import pretrain_encoder

    quiet()
    sys.stdout.write(f"Weights are in {pretrain_encoder(options)}\n")


def add_run(parser: Words) -> None:
    """The one run that a command is about."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory that evaluate made")
