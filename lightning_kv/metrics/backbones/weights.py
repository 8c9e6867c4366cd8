"""Where the weights of a backbone lie, whether they may be used, and what is in them.

Nothing here downloads: that is what ``lightning-kv fetch NAME`` is for.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lightning_kv.metrics.backbones.manifest import WEIGHTS, Weights
from lightning_kv.utilities import files
from lightning_kv.utilities.errors import first_line
from lightning_kv.utilities.formatting import format_bytes
from lightning_kv.utilities.lists import items_of
from lightning_kv.utilities.model_folders import hub_copy, models_folder
from lightning_kv.utilities.nearest import unknown

__all__ = [
    "WEIGHTS",
    "Weights",
    "WeightsUnavailable",
    "checksum",
    "load_state",
    "locate",
    "published",
    "verified",
    "weights_folder",
]

ACCEPTED = "LIGHTNING_KV_ACCEPT_LICENSE"
"""Environment variable with the licences that the user accepts, comma separated."""

UNREADABLE = (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, KeyError)
"""What other libraries raise for a file that is broken, missing, or something else."""

_TENSORS = ("*.safetensors", "*.bin")


class WeightsUnavailable(ValueError):
    """A backbone cannot be built here: its weights, a licence or a package is missing."""


def weights_folder(name: str) -> Path:
    """Folder where the weights of this name belong once they are downloaded.

    It is ``metrics/NAME`` in ``$LIGHTNING_KV_MODELS``, or in ``~/.cache/lightning_kv``.
    """
    return models_folder() / "metrics" / name


def published(name: str) -> Weights:
    """The entry of the manifest with this name.

    Raises:
        ValueError: There is none.

    Example:
        >>> published("alexnet").file
        'alexnet-owt-7be5be79.pth'
    """
    if name not in WEIGHTS:
        raise ValueError(unknown("published weights", name, WEIGHTS))
    return WEIGHTS[name]


def locate(name: str, given: Path | str | None = None, accept: Collection[str] = ()) -> Path:
    """Where these weights lie on this machine; the network is never asked.

    Looked for, in this order: ``given``, the environment variable, :func:`weights_folder`, the
    caches of torch hub and of the model hub. A path that was given must be right: if it is not,
    no other place is tried.

    Args:
        name: Name in the manifest.
        given: The file, or the folder of those that are folders.
        accept: Licences accepted, such as ``CC-BY-NC-4.0``; the environment variable
            ``LIGHTNING_KV_ACCEPT_LICENSE`` adds to them.

    Raises:
        WeightsUnavailable: They are not here, or forbid commercial use and nobody accepted that.
    """
    weights = published(name)
    check_licence(weights, accept)
    said = os.environ.get(weights.variable)
    for path, origin in ((given, "as given"), (said, f"set in {weights.variable}")):
        if path:
            path = Path(path).expanduser()
            if not _whole(path, weights):
                raise WeightsUnavailable(
                    f"The weights '{name}' are not at {path} ({origin}): {_wanted(weights)} is "
                    f"needed there. {_advice(weights)}"
                )
            return path
    places = list(_places(weights))
    for path in places:
        if _whole(path, weights):
            return path
    raise WeightsUnavailable(
        f"The weights '{name}' are not on this machine: {_described(weights)} was looked for in "
        f"{', '.join(map(_short, places))}. {_advice(weights)}"
    )


def checksum(path: Path | str) -> str:
    """SHA-256 of a file, or of the weight files of a folder one after the other, in hexadecimal.

    Raises:
        ValueError: A folder has no weight files.
    """
    return files.checksum(*_tensor_files(Path(path)))


def verified(path: Path | str, weights: Weights) -> str:
    """The checksum of a file, which begins as the published one does, if one is published.

    Raises:
        ValueError: It does not: the file is another one, or broken.
    """
    found = checksum(path)
    if not found.startswith(weights.sha256.lower()):
        raise ValueError(
            f"{path} is not the published '{weights.name}': its SHA-256 begins with {found[:16]}, "
            f"the published one with {weights.sha256}. Get {weights.file} again from "
            f"{weights.page}."
        )
    return found


def load_state(path: Path | str, allow_script: bool = False) -> Any:
    """The tensors of a weights file, by name, on the CPU; loading runs no code from the file.

    Args:
        path: A ``.safetensors`` file, or one that ``torch.save`` has written.
        allow_script: Whether TorchScript, whose code runs on loading, may be loaded; then a
            ``torch.jit.ScriptModule`` is returned for such a file.

    Raises:
        ValueError: The file is TorchScript and nobody allowed that, or cannot be read as weights.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_script(path):
            if not allow_script:
                raise ValueError(
                    f"{path} is TorchScript, and loading TorchScript runs the code in it. Only "
                    "files of plain tensors are loaded unasked. If you trust the file, choose the "
                    "backbone that says torchscript in its name, or pass allow_script=True."
                )
            return torch.jit.load(str(path), map_location="cpu")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as weights: {first_line(error)}. Pass a .safetensors file, or "
            "one that torch.save has written of plain tensors; a download that broke off has to "
            "be repeated."
        ) from error


def _is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive: one that carries code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _tensor_files(path: Path) -> list[Path]:
    """The file itself, or the weight files of a folder: of one format, as one model needs."""
    if path.is_file():
        return [path]
    for pattern in _TENSORS:
        if files := sorted(path.glob(pattern)):
            return files
    raise ValueError(
        f"{path} holds no weights: there is neither a .safetensors nor a .bin file in it. "
        "Pass a weights file, or a folder in the format of transformers."
    )


def _whole(path: Path, weights: Weights) -> bool:
    """Whether the weights are at this path."""
    if not weights.is_folder:
        return path.is_file()
    return (path / "config.json").is_file() and any(any(path.glob(p)) for p in _TENSORS)


def _places(weights: Weights) -> Iterator[Path]:
    """Where the weights may lie when nobody says where."""
    folder = weights_folder(weights.name)
    if weights.is_folder:
        yield folder
    else:
        yield from dict.fromkeys(folder / file for file in (weights.file, *weights.path))
        yield Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    if weights.repo:
        found = hub_copy(weights.repo, "config.json" if weights.is_folder else weights.path[0])
        if found is not None:
            yield found.parent if weights.is_folder else found


def check_licence(weights: Weights, accept: Collection[str]) -> None:
    """Refuse weights that forbid commercial use and whose licence nobody has accepted.

    Raises:
        WeightsUnavailable: Says how to accept it.
    """
    if isinstance(accept, str):
        accept = items_of(accept)
    said = {*accept, *items_of(os.environ.get(ACCEPTED, ""))}
    if weights.noncommercial and weights.licence.casefold() not in {
        licence.strip().casefold() for licence in said
    }:
        raise WeightsUnavailable(
            f"The weights '{weights.name}' ({weights.project}) are not for commercial use: their "
            f"licence is {weights.licence}, and nobody has accepted it. If your use is allowed by "
            f"it, say --accept_license {weights.licence}, set {ACCEPTED}={weights.licence}, or "
            f"pass accept={weights.licence!r}."
        )


def _short(path: Path) -> str:
    """A path as people write it: reports carry this text to other machines."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def _wanted(weights: Weights) -> str:
    if weights.is_folder:
        return "a folder with config.json and a .safetensors or .bin file"
    return f"a file such as {weights.file}"


def _described(weights: Weights) -> str:
    """File, size, checksum and licence in a few words."""
    kind = "the folder " if weights.is_folder else ""
    size = f"{format_bytes(weights.size)}, " if weights.size else ""
    digits = f"SHA-256 {weights.sha256}..., " if weights.sha256 else ""
    return f"{kind}{weights.file} ({size}{digits}licence {weights.licence})"


def _advice(weights: Weights) -> str:
    """What to type."""
    place = "FOLDER" if weights.is_folder else "FILE"
    first = f"Download it with `lightning-kv fetch {weights.name}`, or"
    if not weights.fetchable:
        first = f"Nobody publishes it ready to use. {weights.about} See {weights.page}, then"
    return (
        f"{first} say where a copy lies: write the metric as METRIC/{weights.name}={place}, or set "
        f"{weights.variable}={place}."
    )
