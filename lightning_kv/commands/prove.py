"""`lightning-kv prove`: does what was fitted hold on prompts that it has not seen."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv.commands.calibrate import measured
from lightning_kv.commands.evaluate import DataOptions
from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, quiet, say
from lightning_kv.tasks.options import TrainerOptions
from lightning_kv.utilities.nearest import unknown

if TYPE_CHECKING:  # they take seconds
    from lightning_kv.report.proof_page import Section
    from lightning_kv.tasks.proof.reads import ReadsProof

KINDS = ("budgets",)


@dataclass
class ProveOptions:
    """Are budgets by head better than uniform ones, on prompts that did not choose them?

    Args:
        what: What is proved, budgets.
        heads: File of head curves that calibrate made, or auto; not with --run.
        means: History frames per head (6f,9f,12f of 24: about 25, 35 and 50 %).
        select: Part that chooses what is read, whole frames by score.
        scorer: Of the curves (mass for top-attention, else the part).
        measure: Of the curves, gn, exact, output or mass.
        chunks: Chunks of a clip that are made again under each rule.
        records: Folder of the records: an unfinished proof goes on there.
        run: Of evaluate, with policies NAME-RULE@MEAN, judged instead (none).
        metric: Of such a run (recall, latent_relative, revisit_error).
        out: Page to write, .html or .md (none).
        force: Replace it.
        json: For programs.
        model: One of `lightning-kv list models`, NAME=FILE, or a file.
        precision: float32, reference (the original's casts) or fast (the model's).
        text: Folder of embeddings, or of a text encoder (the shards' own).
        vae: Folder of the VAE (the fetched one).
        data: Held-out prompts and worlds.
        videos: Folder, shards or .csv of videos with captions, instead of prompts (none).
        prompts: Number of prompts from the start of the set; null for all.
        samples: Noises per prompt; statistics count prompts.
        frames: Latent frames per clip, context included (the model's; panorama 72).
        context_frames: Given frames at the start (0: the prompt alone; panorama 15).
        size: HEIGHTxWIDTH in pixels (the model's own).
        seed: Of noise, and of which chunks.
        negative: What guidance leads away from, for models with guidance.
        backend: Attention kernel, sdpa or reference.
        threads: CPU threads per process; can change the last digit.
        trainer: Where it runs.
    """

    what: str
    heads: Path | None = None
    means: list[str] | None = None
    select: str = "top-attention"
    scorer: str | None = None
    measure: str = "gn"
    chunks: int = 3
    records: Path = Path("runs/prove")
    run: Path | None = None
    metric: list[str] | None = None
    out: Path | None = None
    force: bool = False
    json: bool = False
    model: str = "panorama"
    precision: str | None = None
    text: Path | None = None
    vae: Path | None = None
    data: DataOptions = field(default_factory=DataOptions)
    videos: Path | None = None
    prompts: int | None = 16
    samples: int = 1
    frames: int | None = None
    context_frames: int | None = None
    size: str | None = None
    seed: int = 0
    negative: str = ""
    backend: str = "sdpa"
    threads: int = 1
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


def run(options: ProveOptions) -> None:
    """Prove it, and say the verdict.

    Raises:
        ValueError: Nothing of that kind is proved; neither a file nor a run, or both; the page is
            there; or what is given does not fit.
    """
    _check(options)
    quiet()
    if options.run is not None:
        from lightning_kv.runs.directory import RunDirectory
        from lightning_kv.tasks.proof import rollouts

        groups = rollouts.of_run(RunDirectory(options.run), options.metric)
        told = {"groups": [dataclasses.asdict(own) for own in groups]}
        _tell(options, [rollouts.extent(groups)], rollouts.sections(groups), told)
        return
    from lightning_kv.tasks.proof import reads

    found = prove(options)
    if found is not None:  # else another rank tells
        _tell(options, found.words, reads.sections(found), dataclasses.asdict(found))


def _check(options: ProveOptions) -> None:
    """Refuse what would be noticed after minutes of work."""
    if options.what not in KINDS:
        raise ValueError(unknown("thing that is proved", options.what, KINDS))
    if (options.heads is None) == (options.run is None):
        given = "neither is" if options.run is None else "both are"
        raise ValueError(
            f"Reads are judged from a file of head curves, rollouts from a run, and {given} given. "
            "Type `lightning-kv prove budgets heads.safetensors`, or `lightning-kv prove budgets "
            "--run runs/NAME`."
        )
    if options.out is None:
        return
    if options.out.suffix not in (".html", ".htm", ".md") or not options.out.parent.is_dir():
        raise ValueError(
            f"-o/--out {options.out} is no place for a page. It needs a name that ends in .html or "
            ".md, in a folder that is there, such as prove.html."
        )
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} is there already. Give another --out, or --force.")


def prove(options: ProveOptions) -> ReadsProof | None:
    """Run, or go on with, a proof from reads; rank 0 concludes.

    Raises:
        ValueError: Anything that does not fit, before anything is measured.
    """
    from lightning_kv.models.sources import find_model
    from lightning_kv.policies.head_curves import HeadCurves
    from lightning_kv.tasks.budgets import read_frames
    from lightning_kv.tasks.callbacks import ProofWriter
    from lightning_kv.tasks.prove import ProveBudgetsModule

    means = [int(read_frames(str(text), "means", whole=True)) for text in options.means or ()]
    if str(options.heads) != "auto":  # before gigabytes are read
        HeadCurves.load(options.heads)
    module_of = partial(
        ProveBudgetsModule,
        heads=options.heads,
        means=means,
        select=options.select,
        scorer=options.scorer,
        metric=options.measure,
        chunks=options.chunks,
        backend=options.backend,
    )
    return measured(options, find_model(options.model), ProofWriter(options.records), module_of)


def _tell(
    options: ProveOptions,
    sentences: Sequence[str],
    sections: Sequence[Section],
    told: dict[str, Any],
) -> None:
    """The page, and the tables or plain data."""
    if options.out:
        from lightning_kv.report.proof_page import write_proof_page

        source = options.heads or options.run
        title = f"Budgets by head on held-out prompts: {source.name}"
        write_proof_page(options.out, title, sentences, sections, _typed(options))
    if options.json:
        sys.stdout.write(json.dumps(told, indent=1, allow_nan=False) + "\n")
        return
    from rich.table import Table

    out = console()
    for own in sections:
        table = Table(title=own.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for place, head in enumerate(own.heads):
            table.add_column(head, no_wrap=not place, justify="right" if place else "left")
        for row in own.rows:
            table.add_row(*row)
        out.print(table)
        say(out, own.sentences)
    for sentence in sentences:
        out.print(sentence, soft_wrap=True, markup=False)
    if options.out:
        out.print(f"The page is {options.out}", soft_wrap=True)


def _typed(options: ProveOptions) -> str:
    """The command with all that differs from the defaults."""
    usual = ProveOptions(options.what)
    words = ["lightning-kv", "prove", options.what, *filter(None, [str(options.heads or "")])]
    for each in dataclasses.fields(options)[2:]:
        value = getattr(options, each.name)
        if each.name in ("json", "force", "data", "trainer") or value == getattr(usual, each.name):
            continue
        words += [f"--{each.name}", ",".join(value) if isinstance(value, list) else str(value)]
    for each in dataclasses.fields(options.data):
        value = getattr(options.data, each.name)
        if value != getattr(usual.data, each.name) and each.name in ("shards", "seed"):
            words += [f"--data.{each.name}", str(value)]
    return shlex.join(words)


COMMAND = Command(
    "prove",
    ProveOptions,
    run,
    """\
example: lightning-kv prove budgets heads.safetensors --trainer.devices 2 -o prove.html
Of whole rollouts: evaluate -c configs/prove_budgets_memory.yaml, then prove budgets --run DIR""",
    positional={"what": "WHAT", "heads": "HEADS"},
    metavars={
        "means": "FRAMES,...",
        "records": "FOLDER",
        "run": "DIR",
        "metric": "NAME,...",
        "out": "FILE",
        "text": "FOLDER",
        "vae": "FOLDER",
        "videos": "VIDEOS",
        "data.shards": "FOLDER",
        "data.class_path": "CLASS",
        "data.init_args": "ARGS",
        "size": "HxW",
        "negative": "TEXT",
        "trainer.devices": "N",
    },
)
