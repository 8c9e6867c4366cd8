"""Files that weights come in: torch files, safetensors, folders of shards. No code in them runs."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_kv.models.names import describe, some, unwrap
from lightning_kv.utilities.files import checksum

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

Container = Literal["pt", "safetensors", "folder"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of weights that can be used as they are; 8-bit ones need scales that differ by publisher."""


@dataclass(frozen=True)
class Source:
    """What a path holds, before anything is known about its names.

    Args:
        path: As it was given.
        content: Tensors by name, or what else a torch file holds.
        container: How it is stored.
        files: The files with the tensors.
        header: What else a single safetensors file says.
    """

    path: Path
    content: Any
    container: Container
    files: list[Path]
    header: dict[str, str] = field(default_factory=dict)

    def choose(self, key: str | None, order: Sequence[str]) -> tuple[str | None, dict]:
        """The tensors, and the top-level entry they lie under (None where there is none).

        Args:
            key: The entry to take, or what the names to take begin with; default: the first
                entry of ``order`` that is there.
            order: Entries to look for.

        Raises:
            ValueError: The entry is not there, or holds something else than tensors.
        """
        if is_flat(self.content):
            if key is None:
                return None, self.content
            if named := _beginning(key, self.content):
                return key, named
            raise ValueError(
                f"{self.path} has no entry {key!r}: its tensors lie at the top, and none has a "
                "name that begins so. Leave out the key."
            )
        if not isinstance(self.content, dict) or not self.content:
            raise ValueError(f"{self.path} is no table of tensors. Give a file of weights.")
        entries = [str(name) for name in self.content]
        wanted = next((name for name in order if name in entries), None)
        if key is not None and key not in entries:
            if wanted and (named := _beginning(key, self.content[wanted])):
                return key, named
            raise ValueError(f"{self.path} has no entry {key!r}. It has: {some(entries, 8)}.")
        wanted = wanted if key is None else key
        if wanted is None:
            raise ValueError(
                f"{self.path} has no entry {' or '.join(order)}; it looks like "
                f"{describe(entries)}. Give a file of weights, or one of its entries as key."
            )
        if not is_flat(self.content[wanted]):
            raise ValueError(
                f"The entry {wanted!r} of {self.path} is not a table of tensors alone. "
                f"Give the key of another entry: {some(entries, 8)}."
            )
        return wanted, self.content[wanted]

    def sha256(self) -> str:
        """Of the file; of several, that of the lines ``HASH  NAME`` of ``sha256sum``, by name."""
        hashes = [checksum(file) for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        lines = (f"{h}  {file.name}\n" for h, file in zip(hashes, self.files, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_flat(content: Any) -> bool:
    """Whether this is a table of tensors and nothing else."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(v, Tensor) and isinstance(k, str) for k, v in content.items())
    )


def _beginning(key: str, table: Any) -> dict[str, Tensor]:
    """The tensors whose names begin with a key once they are unwrapped."""
    start = unwrap(f"{key.strip('.')}.")
    named = table.items() if is_flat(table) else ()
    return {name: tensor for name, tensor in named if unwrap(name).startswith(start)}


def check_dtype(holder: str, name: str, tensor: Tensor) -> None:
    """Refuse numbers that mean nothing without scales.

    Raises:
        ValueError: The tensor is quantised.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{holder} holds {name!r} as {tensor.dtype}, which is quantised. "
            "Give the weights as float32, bfloat16 or float16."
        )


def open_source(path: Path) -> Source:
    """Open a file or folder of weights; tensors stay on disk until they are used where possible.

    Raises:
        ValueError: Nothing there, a damaged file, code in it, or no file of a known kind.
    """
    if not path.exists():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ValueError(
            f"No file or folder {path}. "
            f"{path.parent} holds: {some(there, 8) or 'nothing, or is not there'}."
        )
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path, path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"{path} is no file of a known kind. Give a folder of safetensors, or a file that "
            f"ends in .safetensors, {', '.join(TORCH_SUFFIXES)}."
        )
    if path.suffix == ".safetensors":
        tensors, header = _read_safetensors(path)
        return Source(path, tensors, "safetensors", [path], header)
    return Source(path, _read_torch(path), "pt", [path])


def _open_folder(path: Path) -> Source:
    """The one set of safetensors in a folder, or in the transformer's folder of a pipeline."""
    for folder in (path, path / "transformer"):
        sets = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
        whole = sorted(folder.glob("*.safetensors"))
        if folder / WEIGHTS_NAME in whole:
            sets.append(folder / WEIGHTS_NAME)
        elif not sets:
            sets = whole
        if len(sets) > 1:
            raise ValueError(
                f"{folder} holds several sets of weights: {some([p.name for p in sets], 6)}. "
                "Give one of these files instead of the folder."
            )
        if sets and sets[0].suffix == ".json":
            return _open_shards(path, sets[0])
        if sets:
            tensors, header = _read_safetensors(sets[0])
            return Source(path, tensors, "folder", sets, header)
    there = some(sorted(p.name for p in path.iterdir()), 8) or "nothing"
    raise ValueError(
        f"The folder {path} holds no safetensors, but {there}. "
        "Give the file itself, or the folder that diffusers' save_pretrained wrote."
    )


def _open_shards(path: Path, index: Path) -> Source:
    """All tensors of the shards that an index names."""
    try:
        where = dict(json.loads(index.read_text())["weight_map"])
        files = sorted({index.parent / name for name in where.values()})
        if any(file.parent != index.parent for file in files):
            raise ValueError("a shard lies in another folder")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is no index of shards: {error!r}. "
            "It has to be JSON with a weight_map from tensor to file name: copy it again."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{index} names {len(files)} shards, and {len(missing)} are not there: "
            f"{some(missing, 6)}. Copy them into {index.parent}."
        )
    tensors = {}
    for file in files:
        tensors |= _read_safetensors(file)[0]
    if differing := sorted(tensors.keys() ^ where.keys()):
        raise ValueError(
            f"The shards beside {index} hold other tensors than it says: {some(differing, 6)}. "
            "They may belong to another checkpoint: copy the folder again."
        )
    return Source(path, tensors, "folder", files)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and what else the header says."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, "safetensors", error) from error


CODE = r"GLOBAL|TorchScript|Can only|unrecognized function"
"""What torch says of a pickle that is more than tensors."""


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(4)
    zipped = start == b"PK\x03\x04"  # files of torch < 1.6 are not, and cannot be mapped
    foreign = start[:1] == b"\x80" and start[1:2] > b"\x02"  # torch writes pickles of protocol 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, the error says
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # unpickling damaged bytes can raise anything
        if foreign or re.search(CODE, str(error)):
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{path} holds code{f' ({name[1]})' if name else ''} beside its tensors; it was "
                "not run. Give a file of tensors alone, such as safetensors; if you trust this "
                "one, load it yourself and save its tensors with torch.save."
            ) from error
        raise _damaged(path, "a torch file", error) from error


def _damaged(path: Path, kind: str, error: Exception) -> ValueError:
    """The error for a file that is cut off, or is no such file at all."""
    with path.open("rb") as file:
        pointer = file.read(24) == b"version https://git-lfs."
    if pointer:
        return ValueError(
            f"{path} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
        )
    reason = str(error).partition(". ")[0].strip() or type(error).__name__
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) cannot be read as {kind}: {reason}. "
        "It may be cut off: compare its size with the original's and copy it again."
    )
