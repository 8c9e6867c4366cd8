"""Commands around models: what there is, where it comes from, how it is stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lightning_kv.arguments import Words, hint
from lightning_kv.terminal import console, tell


def list_command(words: list[str]) -> None:
    """`lightning-kv list`."""
    from lightning_kv.listing import KINDS, listing

    parser = Words("list", "What is there to choose from.")
    parser.add_argument("what", metavar="WHAT", help=f"one of: {', '.join(KINDS)}")
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="only these; or package.module:Class"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    if chosen.what not in KINDS:
        near = hint(chosen.what, KINDS)
        raise ValueError(f"Cannot list {chosen.what!r}.{near} Lists: {', '.join(KINDS)}.")
    rows = listing(chosen.what)
    if chosen.what == "parts":
        from lightning_kv.listing import part_row
        from lightning_kv.policies.plugins import imported

        rows += [part_row(name, imported(name)) for name in chosen.names if ":" in name]
    rows = only(chosen.names, rows)
    if chosen.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    elif chosen.what in ("models", "parts", "policies"):
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
            near = hint(name, known)
            raise ValueError(
                f"Nothing is called {name!r}.{near} Names: {', '.join(sorted(known))}."
            )
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
            out.print(Text(f"    {label:{width}} {value}"), soft_wrap=True)


def fetch_command(words: list[str]) -> None:
    """`lightning-kv fetch`."""
    parser = Words("fetch", "Download a published checkpoint, or the weights of a metric.")
    parser.add_argument("name", metavar="NAME", help="see `lightning-kv list models` and metrics")
    parser.add_argument("--force", action="store_true", help="download again what is there")
    add_license(parser)
    chosen = parser.parse_args(words)
    from lightning_kv.metrics.backbones.weights import WEIGHTS

    if chosen.name in WEIGHTS:
        from lightning_kv.tasks.fetch_weights import fetch_weights, terms

        tell([terms(chosen.name)])
        tell(fetch_weights(chosen.name, chosen.accept_license, chosen.force))
        return
    from lightning_kv.models.catalogue import entry
    from lightning_kv.tasks.fetch import fetch, notice

    tell([notice(entry(chosen.name))])
    tell(fetch(chosen.name, chosen.force))


def encode_command(words: list[str]) -> None:
    """`lightning-kv encode`."""
    parser = Words("encode", "Text states of a set of prompts, computed once for many rollouts.")
    parser.add_argument(
        "prompts", metavar="PROMPTS", type=Path, help="a .txt file, one a line, or a shard folder"
    )
    parser.add_argument(
        "--text",
        metavar="FOLDER",
        type=Path,
        help="holds tokenizer/ and text_encoder/ (what `fetch wan2.1-parts` brings)",
    )
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, help="beside the shards")
    parser.add_argument("--negative", metavar="TEXT", help="a negative prompt to encode too")
    parser.add_argument("--batch", metavar="N", type=int, default=8, help="prompts at a time (8)")
    parser.add_argument("--force", action="store_true", help="encode everything again")
    add_device(parser)
    chosen = parser.parse_args(words)
    from lightning_kv.models.catalogue import parts_folder
    from lightning_kv.tasks.encode import encode

    text = chosen.text or parts_folder()
    if text is None:
        raise ValueError(
            "There is no text encoder here. Type `lightning-kv fetch wan2.1-parts`, or give "
            "--text FOLDER with tokenizer/ and text_encoder/ in it."
        )
    made = encode(
        chosen.prompts,
        chosen.out,
        text,
        device_of(chosen.accelerator),
        chosen.batch,
        chosen.negative,
        chosen.force,
    )
    tell(made.words)


def decode_command(words: list[str]) -> None:
    """`lightning-kv decode`."""
    parser = Words("decode", "Videos from latents that a rollout left on disk.")
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="a file of latents, or a run directory"
    )
    parser.add_argument(
        "-o", "--out", metavar="PATH", type=Path, help="the video, or a folder for those of a run"
    )
    parser.add_argument("--vae", metavar="FOLDER", type=Path, help="the vae/ folder of Wan2.1")
    parser.add_argument(
        "--precision", metavar="NAME", help="of the VAE; that of the rollout where not given"
    )
    parser.add_argument("--force", action="store_true", help="replace videos that are there")
    add_device(parser)
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.decode import decode

    device = device_of(chosen.accelerator)
    made = decode(chosen.source, chosen.out, chosen.vae, device, chosen.precision, chosen.force)
    tell(made.words)


def export_command(words: list[str]) -> None:
    """`lightning-kv export`."""
    parser = Words("export", "Videos of a run under the folders and names that VBench reads.")
    parser.add_argument("run", metavar="RUN", type=Path, help="made with --latents true")
    parser.add_argument(
        "-o", "--out", metavar="DIR", type=Path, required=True, help="a folder for each policy"
    )
    parser.add_argument("--vae", metavar="FOLDER", type=Path, help="the vae/ folder of Wan2.1")
    parser.add_argument(
        "--precision", metavar="NAME", help="of the VAE; that of the rollout where not given"
    )
    parser.add_argument("--force", action="store_true", help="write videos again that are there")
    add_device(parser)
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.export import export

    device = device_of(chosen.accelerator)
    made = export(chosen.run, chosen.out, chosen.vae, device, chosen.precision, chosen.force)
    tell(made.words)


def convert_command(words: list[str]) -> None:
    """`lightning-kv convert`."""
    parser = Words("convert", "A checkpoint under other names; no number changes.")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a file, or a folder of shards")
    parser.add_argument(
        "-o", "--out", metavar="PATH", type=Path, required=True, help="what to write"
    )
    parser.add_argument(
        "--to", metavar="NAMING", required=True, help="original (a file) or diffusers (a folder)"
    )
    parser.add_argument("--key", metavar="KEY", help="entry of a .pt file, or prefix of names")
    parser.add_argument(
        "--lora", metavar="PATH", type=Path, help="merge a LoRA, as strong as its writer says"
    )
    parser.add_argument(
        "--heads", metavar="N", type=int, help="for diffusers; width divided by 128"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.convert import convert

    tell(convert(**vars(chosen)).words)


def doctor_command(words: list[str]) -> None:
    """`lightning-kv doctor`; exit code 1 where something needed does not work."""
    parser = Words("doctor", "What works here: packages, devices, attention kernels, weights.")
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    from lightning_kv.tasks.doctor import doctor, render

    found = doctor()
    if chosen.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
    else:
        console().print(render(found))
    if not found.healthy:
        raise SystemExit(1)


def add_license(parser: Words) -> None:
    """Agreement to licences of weights."""
    parser.add_argument(
        "--accept_license",
        metavar="ID",
        action="append",
        default=[],
        help="agree to the licence of non-commercial weights, such as cc-by-nc-4.0",
    )


def add_device(parser: Words) -> None:
    """Where it runs."""
    parser.add_argument(
        "--accelerator", metavar="NAME", default="auto", help="cpu, gpu, or auto (auto)"
    )


def device_of(accelerator: str) -> str:
    """The torch device of an accelerator.

    Raises:
        ValueError: There is none.
    """
    from lightning_kv.tasks.launch import resolved

    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"--accelerator {accelerator!r} is unknown. Use cpu, gpu or auto.")
    return "cuda" if resolved(accelerator) == "gpu" else "cpu"
