"""`lightning-kv prove`: does what was fitted hold on prompts that it has not seen."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
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
    from lightning_kv.tasks.calibration.module import SitesModule
    from lightning_kv.tasks.callbacks.clip_records import ClipRecordWriter
    from lightning_kv.tasks.proof.reads import ReadsProof
    from lightning_kv.tasks.proof.scorer import ScorerProof

KINDS = {
    "budgets": ("select", "scorer", "measure", "chunks"),
    "scorer": ("linear",),
}
"""What is proved, and the options that only it has."""
EXAMPLES = {"budgets": "heads.safetensors", "scorer": "scorer.safetensors"}
TITLES = {"budgets": "Budgets by head", "scorer": "A learned scorer"}


@dataclass
class ProveOptions:
    """Are budgets by head, or a learned scorer, better on prompts that did not choose them?

    Args:
        what: What is proved, budgets or scorer.
        file: Of head curves, or a scorer; or auto. Not with --run.
        means: History frames per head (25, 35, 50 %; scorer 6f,9f,15f).
        select: (budgets) Part that chooses what is read.
        scorer: (budgets) Of the curves (mass for top-attention, else the part).
        measure: (budgets) Of the curves, gn, exact, output or mass.
        chunks: (budgets) Chunks of a clip that are made again under each rule.
        linear: (scorer) File of a linear student, to see if it does as well (none).
        records: Where an unfinished one goes on (runs/prove, prove_scorer).
        run: Of evaluate: NAME-RULE@MEAN, or distilled@MEAN (none).
        metric: Of such a run (recall, latent_relative, revisit_error).
        out: Page to write, .html or .md (none).
        force: Replace it.
        json: For programs.
        model: One of `lightning-kv list models`, NAME=FILE, or a file.
        precision: float32, reference (the original's casts) or fast (the model's).
        text: Folder of embeddings, or of a text encoder (the shards' own).
        vae: Folder of the VAE (the fetched one).
        data: Held-out prompts and worlds.
        videos: (budgets) Folder, shards or .csv, for prompts (none).
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
    file: Path | None = None
    means: list[str] | None = None
    select: str = "top-attention"
    scorer: str | None = None
    measure: str = "gn"
    chunks: int = 3
    linear: Path | None = None
    records: Path | None = None
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
        _tell_run(options)
    elif options.what == "scorer":
        from lightning_kv.tasks.proof import scorer

        if (found := prove_scorer(options)) is not None:  # else another rank tells
            _tell(options, found.words, scorer.sections(found), dataclasses.asdict(found))
    else:
        from lightning_kv.tasks.proof import reads

        if (found := prove(options)) is not None:
            _tell(options, found.words, reads.sections(found), dataclasses.asdict(found))


def _tell_run(options: ProveOptions) -> None:
    """What a run of whole rollouts proves."""
    from lightning_kv.runs.directory import RunDirectory
    from lightning_kv.tasks.proof import rollouts, scorer_rollouts

    kind = scorer_rollouts if options.what == "scorer" else rollouts
    groups = kind.of_run(RunDirectory(options.run), options.metric)
    told = {"groups": [dataclasses.asdict(own) for own in groups]}
    _tell(options, kind.extent(groups), kind.sections(groups), told)


def _check(options: ProveOptions) -> None:
    """Refuse what would be noticed after minutes of work."""
    if options.what not in KINDS:
        raise ValueError(unknown("thing that is proved", options.what, KINDS))
    usual = ProveOptions(options.what)
    for other in (name for kind in KINDS if kind != options.what for name in KINDS[kind]):
        if getattr(options, other) != getattr(usual, other):
            raise ValueError(
                f"--{other} has no part in `prove {options.what}`, and {getattr(options, other)} "
                f"was given. It has --{', --'.join(KINDS[options.what])}."
            )
    if (options.file is None) == (options.run is None):
        given = "neither is" if options.run is None else "both are"
        what, file = options.what, EXAMPLES[options.what]
        raise ValueError(
            f"What was fitted is judged from its file, whole rollouts from a run, and {given} "
            f"given. Type `lightning-kv prove {what} {file}`, or `lightning-kv prove {what} --run "
            "runs/NAME`."
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
    from lightning_kv.policies.head_curves import HeadCurves
    from lightning_kv.tasks.callbacks import ProofWriter
    from lightning_kv.tasks.prove import ProveBudgetsModule

    if str(options.file) != "auto":  # before gigabytes are read
        HeadCurves.load(options.file)
    module_of = partial(
        ProveBudgetsModule,
        heads=options.file,
        means=_means(options),
        select=options.select,
        scorer=options.scorer,
        metric=options.measure,
        chunks=options.chunks,
        backend=options.backend,
    )
    return _measured(options, ProofWriter(options.records or "runs/prove"), module_of)


def prove_scorer(options: ProveOptions) -> ScorerProof | None:
    """Run, or go on with, a proof of a scorer from its decisions; rank 0 concludes.

    Raises:
        ValueError: Anything that does not fit, before anything is measured.
    """
    from lightning_kv.policies.scorer.artifact import Scorer
    from lightning_kv.tasks.callbacks import ScorerProofWriter
    from lightning_kv.tasks.prove import ProveScorerModule

    for path in filter(None, (options.file, options.linear)):
        if str(path) != "auto":  # before gigabytes are read
            Scorer.load(path)
    module_of = partial(
        ProveScorerModule,
        scorer=options.file,
        linear=options.linear,
        budgets=_means(options),
        backend=options.backend,
    )
    return _measured(options, ScorerProofWriter(options.records or "runs/prove_scorer"), module_of)


def _means(options: ProveOptions) -> list[int]:
    """History frames per head.

    Raises:
        ValueError: One is no whole number.
    """
    from lightning_kv.tasks.budgets import read_frames

    return [int(read_frames(str(text), "means", whole=True)) for text in options.means or ()]


def _measured(
    options: ProveOptions, writer: ClipRecordWriter, module_of: Callable[..., SitesModule]
) -> Any:
    from lightning_kv.models.sources import find_model

    return measured(options, find_model(options.model), writer, module_of)


def _tell(
    options: ProveOptions,
    sentences: Sequence[str],
    sections: Sequence[Section],
    told: dict[str, Any],
) -> None:
    """The page, and the tables or plain data."""
    if options.out:
        from lightning_kv.report.proof_page import write_proof_page

        source = options.file or options.run
        title = f"{TITLES[options.what]} on held-out prompts: {source.name}"
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
    words = ["lightning-kv", "prove", options.what, *filter(None, [str(options.file or "")])]
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
example: lightning-kv prove budgets heads.safetensors -o prove.html, or prove scorer FILE
--run: evaluate -c configs/prove_budgets_memory.yaml, or configs/distilled_vs_training_free.yaml""",
    positional={"what": "WHAT", "file": "FILE"},
    metavars={
        "means": "FRAMES,...",
        "linear": "FILE",
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
