"""`lightning-kv encode`: text states of a set of prompts, computed once for many rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell


@dataclass(frozen=True)
class EncodeOptions:
    """Text states of a set of prompts, computed once for many rollouts.

    Args:
        prompts: A .txt file, one a line, or a shard folder.
        out: Folder of the text states (beside the shards).
        text: Holds tokenizer/ and text_encoder/ (what `fetch wan2.1-parts` brings).
        negative: A negative prompt to encode too (none).
        batch: Prompts at a time.
        force: Encode everything again.
        accelerator: cpu, gpu, or auto: a CUDA GPU if there is one.
    """

    prompts: Path
    out: Path | None = None
    text: Path | None = None
    negative: str | None = None
    batch: int = 8
    force: bool = False
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


def run(options: EncodeOptions) -> None:
    """Encode them.

    Raises:
        ValueError: There is no text encoder here.
    """
    from lightning_kv.models.catalogue import parts_folder
    from lightning_kv.tasks.encode import encode
    from lightning_kv.tasks.trainer import device_of

    text = options.text or parts_folder()
    if text is None:
        raise ValueError(
            "There is no text encoder here. Type `lightning-kv fetch wan2.1-parts`, or give "
            "--text FOLDER with tokenizer/ and text_encoder/ in it."
        )
    made = encode(
        options.prompts,
        options.out,
        text,
        device_of(options.accelerator),
        options.batch,
        options.negative,
        options.force,
    )
    tell(made.words)


COMMAND = Command(
    "encode",
    EncodeOptions,
    run,
    """\
The text encoder of Wan has 5.7 billion parameters. With the text states of a set on disk, rollouts
need none: the folder is prompts (--data.shards) and text (--text) of every later run.

examples:
  lightning-kv encode prompts.txt --out data/mine
  lightning-kv encode data/mine --text models/wan2.1 --negative "blurred, overexposed" """,
    positional={"prompts": "PROMPTS"},
    metavars={"out": "FOLDER", "text": "FOLDER", "negative": "TEXT"},
)
