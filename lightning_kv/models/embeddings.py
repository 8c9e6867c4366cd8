"""Text states on disk: computed once, then read without a text encoder.

Layout of a folder, which may be one of prompt shards::

    embeddings.json                 what there is, and what made it
    embeddings-000000.safetensors   one bfloat16 tensor [tokens, width] per prompt, named by the
                                    beginning of the prompt's sha256

``embeddings.json``::

    {"schema": 1, "fingerprint": str, "length": int, "width": int, "dtype": "bfloat16",
     "files": [{"file": str, "bytes": int, "sha256": str}, ...],
     "prompts": [{"prompt": str, "tokens": int, "file": str}, ...]}

Every file also says in its own metadata what it holds, so an interrupted run goes on after the
last whole file. Prompts are looked up by their text as written, before any cleaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_kv.utilities.files import checksum, write_atomic
from lightning_kv.utilities.nearest import hint

SCHEMA = 1
INDEX = "embeddings.json"
DTYPE = torch.bfloat16
PATTERN = "embeddings-*.safetensors"


class PromptBook(nn.Module):
    """Looks text states up by prompt; used in place of a text encoder.

    ``encoder`` is the fingerprint of the text encoder, ``fingerprint`` that of all states.

    A module, so that it follows the model it belongs to: ``to`` sets where its states go.

    Args:
        folder: Where `write_embeddings` has written.
        device: Of the states it gives.
        dtype: Of the states it gives; None for the stored one.

    Raises:
        ValueError: There is no index, or a file is missing or has another size than it says.
    """

    def __init__(
        self,
        folder: Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.encoder: str = index["fingerprint"]
        self.fingerprint = checksum(self.folder / INDEX)
        self.length: int = index["length"]
        self.width: int = index["width"]
        self._files: dict[str, str] = {row["prompt"]: row["file"] for row in index["prompts"]}
        self._parts: list[dict[str, Any]] = index["files"]
        place = torch.empty(0, device=device, dtype=dtype or DTYPE)
        self.register_buffer("place", place, persistent=False)
        for part in self._parts:
            path = self.folder / part["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != part["bytes"]:
                raise _damaged(path, f"has {size} bytes, the index says {part['bytes']}")

    @property
    def prompts(self) -> list[str]:
        """All prompts, in the order in which they were written."""
        return list(self._files)

    def verify(self) -> None:
        """Check every file against its checksum.

        Raises:
            ValueError: A file is damaged; names it.
        """
        for part in self._parts:
            path = self.folder / part["file"]
            if checksum(path) != part["sha256"]:
                raise _damaged(path, "has another checksum than the index says")

    def require(self, prompts: Sequence[str]) -> None:
        """Check that prompts are in the book, before anybody waits for them.

        Raises:
            ValueError: Names the first that is not.
        """
        for prompt in prompts:
            self._file(prompt)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Text states ``[B, length, width]``, 0 after each prompt's last token.

        Raises:
            ValueError: A prompt is not in the book.
        """
        states = [self._states(prompt) for prompt in prompts]
        return padded(states, self.length).to(self.place)

    def _file(self, prompt: str) -> Path:
        if prompt not in self._files:
            raise ValueError(
                f"There are no text states for {prompt!r} among the {len(self._files)} prompts of "
                f"{self.folder}.{hint(prompt, self._files)} Prompts are told apart by every "
                "letter; encode new ones: `lightning-kv encode PROMPTS --text FOLDER --out DIR`."
            )
        return self.folder / self._files[prompt]

    def _states(self, prompt: str) -> Tensor:
        path = self._file(prompt)
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(_name(prompt))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"cannot be read: {error}") from error


def padded(states: Sequence[Tensor], length: int) -> Tensor:
    """Stack ``[tokens, width]`` states to ``[B, length, width]``, 0 after the last token."""
    return torch.stack([nn.functional.pad(s, (0, 0, 0, length - len(s))) for s in states])


def write_embeddings(
    folder: Path,
    items: Iterable[tuple[str, Tensor]],
    fingerprint: str,
    length: int,
    per_file: int = 64,
) -> int:
    """Add text states to a folder, then write its index; equal input gives equal bytes.

    What whole files hold already is kept, so an interrupted run is repeated as it was, or with
    the items that `held_prompts` does not name. Items are taken as they come, ``per_file`` at a
    time in memory.

    Args:
        folder: Where to write; made where it is missing. Other files in it are left alone.
        items: Prompts and their states ``[tokens, width]``.
        fingerprint: Identity of the text encoder.
        length: Tokens that the states are padded to when they are read.
        per_file: Prompts per file.

    Returns:
        Prompts that were added.

    Raises:
        ValueError: The folder holds states of another encoder or a damaged file, the states have
            other sizes, or there is nothing to index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = set(held_prompts(folder, fingerprint, length))
    for half in folder.glob(f".{PATTERN}.*.tmp"):  # of a run that was killed
        half.unlink()
    added, fresh = 0, _fresh(items, held, length)
    names = (n for i in count() if not (folder / (n := f"embeddings-{i:06d}.safetensors")).exists())
    while part := list(islice(fresh, per_file)):
        write_atomic(folder / next(names), _packed(part, fingerprint, length))
        added += len(part)
    _write_index(folder, fingerprint, length)
    return added


def held_prompts(folder: Path, fingerprint: str, length: int) -> list[str]:
    """Prompts whose states are in whole files of a folder, indexed or not.

    Args:
        folder: May be missing.
        fingerprint: Identity of the text encoder that must have made them.
        length: Length that must have been used.

    Raises:
        ValueError: They are of another encoder or length, or a file is damaged.
    """
    parts = _parts(Path(folder))
    for part in parts:
        if (part.fingerprint, part.length) != (fingerprint, length):
            raise ValueError(
                f"{part.path} was made by another text encoder: fingerprint "
                f"{part.fingerprint[:12]}, length {part.length}; now they are {fingerprint[:12]} "
                f"and {length}. Use another folder, or --force to encode everything again."
            )
    return [row["prompt"] for part in parts for row in part.prompts]


def remove_embeddings(folder: Path) -> None:
    """Delete the text states of a folder and their index, and nothing else."""
    for path in [Path(folder) / INDEX, *sorted(Path(folder).glob(PATTERN))]:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Part:
    """What a file says about itself."""

    path: Path
    fingerprint: str
    length: int
    prompts: list[dict[str, Any]]
    width: int


def _parts(folder: Path) -> list[_Part]:
    parts = []
    for path in sorted(folder.glob(PATTERN)):
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                rows = about["prompts"]
                width = file.get_slice(_name(rows[0]["prompt"])).get_shape()[1]
            if about["schema"] != SCHEMA:
                raise ValueError(f"its schema is {about['schema']}")
            parts.append(_Part(path, about["fingerprint"], about["length"], rows, width))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise _damaged(path, f"cannot be read as schema {SCHEMA}: {error}") from error
    return parts


def _fresh(
    items: Iterable[tuple[str, Tensor]], held: set[str], length: int
) -> Iterator[tuple[str, Tensor]]:
    """Items that are not held yet, each prompt once."""
    width = None
    for prompt, states in items:
        width = width or states.shape[-1]
        if states.dim() != 2 or not 1 <= len(states) <= length or states.shape[1] != width:
            raise ValueError(
                f"Text states of {prompt!r} have the shape {tuple(states.shape)}. "
                f"Give [tokens, {width}] with 1 to {length} tokens."
            )
        if prompt not in held:
            held.add(prompt)
            yield prompt, states


def _packed(items: Sequence[tuple[str, Tensor]], fingerprint: str, length: int) -> bytes:
    """Content of one file; the metadata is a single entry, for several have no fixed order."""
    about = {
        "schema": SCHEMA,
        "fingerprint": fingerprint,
        "length": length,
        "prompts": [{"prompt": prompt, "tokens": len(states)} for prompt, states in items],
    }
    tensors = {
        _name(prompt): states.detach().to("cpu", DTYPE).contiguous() for prompt, states in items
    }
    return save(tensors, {"about": json.dumps(about)})


def _write_index(folder: Path, fingerprint: str, length: int) -> None:
    """Last, so that an interrupted run leaves no index that vouches for half a set."""
    parts = _parts(folder)
    widths = sorted({part.width for part in parts})
    if len(widths) != 1:
        raise ValueError(
            f"The text states in {folder} have {len(widths)} widths: {widths}. "
            "Write states of one encoder, and at least one."
        )
    files = [
        {"file": p.path.name, "bytes": p.path.stat().st_size, "sha256": checksum(p.path)}
        for p in parts
    ]
    index = {
        "schema": SCHEMA,
        "fingerprint": fingerprint,
        "length": length,
        "width": widths[0],
        "dtype": str(DTYPE).removeprefix("torch."),
        "files": files,
        "prompts": [row | {"file": part.path.name} for part in parts for row in part.prompts],
    }
    content = (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode()
    path = folder / INDEX
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"There are no text states in {folder}: it has no {INDEX}. Make them with "
            f"`lightning-kv encode PROMPTS --text FOLDER --out {folder}`, which also goes on "
            "where it was interrupted."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = {part["file"] for part in index["files"]}
        sound = (index["schema"], index["dtype"]) == (SCHEMA, "bfloat16")
        sound = sound and all(row["file"] in files for row in index["prompts"])
        sound = sound and all(Path(file).name == file for file in files)
        sound = sound and {"fingerprint", "length", "width"} <= index.keys()
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(
            f"The index of text states {path} cannot be used: it is not of schema {SCHEMA} with "
            "its files beside it. Run `lightning-kv encode` again, which writes it anew."
        )
    return index


def _name(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(
        f"A file of text states is missing or damaged. {path} {how}. Delete it and run "
        "`lightning-kv encode` again: only its prompts are encoded anew."
    )
