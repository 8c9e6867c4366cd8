"""Text states of a set of prompts, computed once so that rollouts need no text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_kv.data.make_shards import make_prompt_shards
from lightning_kv.data.shards import INDEX, PromptShards, read_index
from lightning_kv.models.embeddings import held_prompts, remove_embeddings, write_embeddings
from lightning_kv.models.text import LENGTH, WanText, text_fingerprint
from lightning_kv.tasks.progress import ProgressLine
from lightning_kv.utilities.formatting import several


@dataclass(frozen=True)
class Encoded:
    """What a run has encoded.

    Args:
        out: Folder of the text states.
        added: Prompts encoded now.
        kept: Prompts that had their states already.
        notes: What was found on the way, in sentences.
    """

    out: Path
    added: int
    kept: int
    notes: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """What was done, in sentences."""
        there = f"the text states of all {self.added + self.kept} prompts are in {self.out}"
        if not self.added:
            return [f"Nothing to do: {there}.", *self.notes]
        kept = f", {self.kept} were there already" if self.kept else ""
        return [f"Done: {there}; {self.added} were encoded now{kept}.", *self.notes]


@dataclass(frozen=True)
class _Prompts:
    """Prompts of a set in their order, repeated ones included, and what to say about them."""

    texts: list[str]
    notes: tuple[str, ...]


def encode(
    prompts: Path,
    out: Path | None,
    text: Path,
    device: str | torch.device,
    batch: int = 8,
    negative: str | None = None,
    force: bool = False,
) -> Encoded:
    """Write the text states of a set of prompts; an interrupted run goes on where it stopped.

    Args:
        prompts: A folder of prompt shards, or a ``.txt`` file with one prompt per line.
        out: Where the states go; beside the shards by default. A ``.txt`` becomes shards there.
        text: Folder that holds ``tokenizer/`` and ``text_encoder/``.
        device: Where the encoder runs.
        batch: Prompts at a time.
        negative: A prompt to encode too; the empty one, which guided models need, always is.
        force: Encode everything again, replacing the states in ``out``.

    Raises:
        ValueError: Something is missing or does not fit, before anything is encoded.
    """
    if batch < 1:
        raise ValueError(f"A batch of {batch} prompts encodes nothing. Give 1 or more, such as 8.")
    listed = prompts.suffix == ".txt"
    found = _read_list(prompts) if listed else _read_shards(prompts)
    out = _folder(prompts, out, listed)
    fingerprint = text_fingerprint(text)
    wanted = list(dict.fromkeys([*found.texts, "", *([negative] if negative else [])]))
    held = set() if force else set(held_prompts(out, fingerprint, LENGTH))
    left = [prompt for prompt in wanted if prompt not in held]
    encoder = WanText.load(text, device) if left else None
    if listed:
        _write_shards(prompts, found.texts, out)
    if force:
        remove_embeddings(out)
    write_embeddings(out, _states(encoder, left, batch), fingerprint, LENGTH)
    extra = "The empty prompt is encoded too" + (", and the negative one." if negative else ".")
    return Encoded(out, len(left), len(wanted) - len(left), (*found.notes, extra))


def _states(
    encoder: WanText | None, prompts: Sequence[str], batch: int
) -> Iterator[tuple[str, Tensor]]:
    """Prompts and their states behind a progress line, silent where there is no terminal."""
    if encoder is None:
        return
    with ProgressLine(len(prompts), "prompts", "encoding") as line:
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            yield from zip(part, encoder.states(part), strict=True)
            line.advance(len(part))


def _read_list(path: Path) -> _Prompts:
    """Prompts of a text file; blank and repeated lines are counted."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The list of prompts {path} cannot be read: {error}. "
            "Give a UTF-8 text file with one prompt per line."
        ) from error
    lines = [line.strip() for line in content.removesuffix("\n").split("\n")]
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(
            f"The list of prompts {path} holds none: {len(lines)} lines, all blank. "
            "Write one prompt per line."
        )
    notes = [f"{path}: {several(len(texts), 'prompt')}."]
    if blank := len(lines) - len(texts):
        notes.append(f"Blank lines left out: {blank}.")
    return _Prompts(texts, (*notes, *_repeats(texts)))


def _read_shards(path: Path) -> _Prompts:
    if not path.exists():
        raise ValueError(
            f"There are no prompts at {path}. Give a folder of prompt shards, or a .txt file with "
            "one prompt per line."
        )
    texts = [sample.prompt for sample in PromptShards(read_index(path))]
    return _Prompts(texts, (f"{path}: {several(len(texts), 'prompt')}.", *_repeats(texts)))


def _repeats(texts: Sequence[str]) -> list[str]:
    repeated = len(texts) - len(set(texts))
    return [f"Repeated prompts: {repeated}, kept in the set, encoded once."] if repeated else []


def _folder(prompts: Path, out: Path | None, listed: bool) -> Path:
    if listed and out is None:
        raise ValueError(
            f"It is not said where the text states of {prompts} go. "
            f"Give --out, such as --out {prompts.with_suffix('')}."
        )
    if out is not None:
        return Path(out)
    return prompts if prompts.is_dir() else prompts.parent


def _write_shards(source: Path, texts: list[str], out: Path) -> None:
    """Make a list into prompt shards, or check that they are there already."""
    if (out / INDEX).is_file():
        there = [sample.prompt for sample in PromptShards(read_index(out))]
        if there != texts:
            raise ValueError(
                f"{out} holds another set of prompts: {len(there)} instead of the {len(texts)} of "
                f"{source}, or other texts. Give another --out."
            )
        return
    make_prompt_shards(source, out)
