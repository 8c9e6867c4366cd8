"""`lightning-kv convert`: a checkpoint under the names of the original or of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell


@dataclass(frozen=True)
class ConvertOptions:
    """A checkpoint under other names; no number changes.

    Args:
        source: A file, or a folder of shards.
        out: What to write.
        to: Original (a file) or diffusers (a folder).
        key: Entry of a .pt file, or prefix of names (the EMA weights where there are any).
        lora: Merge a LoRA, as strong as its writer says (none).
        heads: For diffusers (width divided by 128).
        force: Replace what is there.
    """

    source: Path
    out: Path
    to: str
    key: str | None = None
    lora: Path | None = None
    heads: int | None = None
    force: bool = False


def run(options: ConvertOptions) -> None:
    """Convert it."""
    from lightning_kv.tasks.convert import convert

    tell(convert(**vars(options)).words)


COMMAND = Command(
    "convert",
    ConvertOptions,
    run,
    """\
examples:
  lightning-kv convert self_forcing_dmd.pt -o self-forcing-diffusers --to diffusers
  lightning-kv convert base.pt --lora lora.pt -o longlive.safetensors --to original""",
    positional={"source": "SOURCE"},
    metavars={"to": "NAMING", "key": "KEY"},
)
