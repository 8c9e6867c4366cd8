"""Checkpoints from one program's format to another's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_kv.models.checkpoints import (
    Checkpoint,
    Naming,
    check_target,
    looks_like,
    read_checkpoint,
    save_checkpoint,
)


@dataclass(frozen=True)
class Converted:
    """What was converted.

    Args:
        checkpoint: What was read, with the LoRA merged.
        out: Where it was written.
        words: Sentences for the terminal.
    """

    checkpoint: Checkpoint
    out: Path
    words: list[str]


def convert(
    source: Path,
    out: Path,
    to: Naming,
    key: str | None = None,
    lora: Path | None = None,
    heads: int | None = None,
    force: bool = False,
) -> Converted:
    """Write a checkpoint under original names or as a diffusers folder; no number changes.

    Args:
        source: A torch file, a safetensors file or a folder of safetensors.
        out: A ``.safetensors`` file (``original``) or a folder (``diffusers``).
        to: Whose names to write.
        key: Top-level entry of a torch file, or what the names to take begin with; default: the
            EMA weights where there are any.
        lora: A LoRA to merge into the weights, as strong as its writer says: a file, or a folder
            of PEFT or diffusers.
        heads: Number of heads for diffusers' configuration; default: ``dim / 128``.
        force: Replace ``out``.

    Raises:
        ValueError: ``out`` is there or is no place for this format, or ``source`` or ``lora``
            cannot be used.
    """
    check_target(out, to)
    if out.exists() and not force:
        raise ValueError(f"{out} is already there. Give another name, or force to replace it.")
    checkpoint = read_checkpoint(source, key, lora)
    origin = {"source": source.name, "sha256": checkpoint.sha256, "key": checkpoint.key}
    origin |= {"lora": checkpoint.lora, "lora_sha256": checkpoint.lora_sha256}
    if strength := checkpoint.strength:
        origin |= {"lora_strength": str(strength), "lora_strength_by": strength.origin}
    metadata = {name: value for name, value in origin.items() if value is not None}
    save_checkpoint(checkpoint.tensors, out, to, metadata, heads)
    return Converted(checkpoint, out, _words(checkpoint, source, out, to))


def _words(checkpoint: Checkpoint, source: Path, out: Path, to: Naming) -> list[str]:
    tensors = checkpoint.tensors.values()
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    kinds = {"pt": "a torch file", "safetensors": "a safetensors file", "folder": "a folder"}
    entry = "" if checkpoint.key is None else f", entry {checkpoint.key!r}"
    words = [
        f"Read {source}: {kinds[checkpoint.container]} with {checkpoint.format} names{entry}.",
        f"It holds {looks_like(checkpoint.tensors)}.",
        f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} parameters, "
        f"{', '.join(f'{name} ({count})' for name, count in dtypes.most_common())}.",
        f"SHA-256 {checkpoint.sha256}.",
    ]
    if strength := checkpoint.strength:
        words.append(
            f"Merged the LoRA {checkpoint.lora} (SHA-256 {checkpoint.lora_sha256}) at strength "
            f"{strength}, by: {strength.origin}."
        )
        words += strength.notes
    return [*words, f"Wrote {out} with {to} names."]
