"""Download published checkpoints, what they need beside them, and the weights of metrics."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from lightning_kv.metrics.backbones.weights import (
    WEIGHTS,
    Weights,
    WeightsUnavailable,
    check_licence,
    locate,
    verified,
    weights_folder,
)
from lightning_kv.models.catalogue import CATALOGUE, PARTS, Download
from lightning_kv.tasks.download import DownloadFailed, download, download_from_hub, need_hub
from lightning_kv.utilities.errors import first_line
from lightning_kv.utilities.formatting import format_bytes
from lightning_kv.utilities.model_folders import free_disk
from lightning_kv.utilities.nearest import unknown


def fetch(name: str, accept: Collection[str] = (), force: bool = False) -> list[str]:
    """Download a published checkpoint, the parts that all of them need, or weights of a metric.

    Args:
        name: Such as ``self-forcing``, ``wan2.1-parts`` or ``dino-vitb16``.
        accept: Licences accepted for weights of metrics that forbid commercial use.
        force: Download again what is here already.

    Returns:
        Sentences for the terminal.

    Raises:
        ValueError: No such name, nothing to download, no hub client, too little disk, or the
            download failed.
        WeightsUnavailable: A licence was not accepted.
    """
    found = published(name)
    weights = isinstance(found, Weights)
    place = _weights_here(found, accept) if weights else found.root
    if place is not None and not force:
        return [f"{name} is already here, in {place}. Nothing was downloaded."]
    return [_fetch_weights(found, accept, force) if weights else _fetch_model(found, force)]


def published(name: str) -> Download | Weights:
    """What can be downloaded under a name.

    Raises:
        ValueError: Nothing.
    """
    known: dict[str, Download | Weights] = {**CATALOGUE, **PARTS, **WEIGHTS}
    if name not in known:
        raise ValueError(unknown("download", name, known))
    return known[name]


def terms(name: str) -> str:
    """Whose it is and under which terms; to be read before downloading.

    Raises:
        ValueError: No such name.
    """
    found = published(name)
    size = "" if found.size is None else f" {format_bytes(found.size)}."
    return f"{name} comes from {found.page}. Licence: {found.licence}.{size}"


def _weights_here(weights: Weights, accept: Collection[str]) -> Path | None:
    check_licence(weights, accept)
    with suppress(WeightsUnavailable):
        return locate(weights.name, accept=accept)
    return None


def _fetch_weights(weights: Weights, accept: Collection[str], force: bool) -> str:
    """Bring what a metric looks through here, and check it where a checksum is published."""
    name = weights.name
    if not weights.fetchable:
        raise ValueError(
            f"{name} cannot be downloaded: {weights.about} See {weights.page}, and say where your "
            f"copy lies with METRIC/{name}=FILE or {weights.variable}=FILE."
        )
    try:
        place, digest = _brought(weights, accept, force)
    except DownloadFailed as error:
        raise ValueError(
            f"{name} was not downloaded from {weights.page}: {error}. Try again, or copy it from "
            f"elsewhere to {weights_folder(name)}."
        ) from error
    checked = "as published" if weights.sha256 else "no checksum is published to compare with"
    return f"{name} is in {place}. SHA-256 {digest} ({checked})."


def _brought(weights: Weights, accept: Collection[str], force: bool) -> tuple[Path, str]:
    """Download, and check; returns where the weights are, and their checksum."""
    folder = weights_folder(weights.name)
    if not weights.repo:
        path = folder / weights.file
        digest = download(
            weights.url, path, lambda part: verified(part, weights), bool(weights.sha256), force
        )
        return path, digest
    download_from_hub(weights.repo, folder, weights.path or None, force)
    place = locate(weights.name, accept=accept)
    try:
        return place, verified(place, weights)
    except ValueError:  # or the next fetch would find it here
        if folder in place.parents:
            place.unlink(missing_ok=True)
        raise


def _fetch_model(found: Download, force: bool) -> str:
    """Bring the files of a checkpoint, or the parts of all, here."""
    patterns = [f"{file}*" if file.endswith("/") else file for file in found.files]
    try:
        need_hub()
        size = _size(found)
        _check_disk(found, size)
        download_from_hub(found.repo, found.folder, patterns, force)
    except DownloadFailed as error:
        raise ValueError(_failed(found, str(error))) from error
    if found.root is None:
        raise ValueError(_failed(found, f"files are missing in {found.folder} afterwards"))
    return f"{found.name} is in {found.folder}: {format_bytes(size)}."


def _size(found: Download) -> int:
    """Bytes of the files, as the hub lists them.

    Raises:
        ValueError: The repository does not have one of them.
        DownloadFailed: The hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        listed = HfApi().model_info(found.repo, files_metadata=True).siblings
    except (OSError, HTTPError) as error:
        raise DownloadFailed(first_line(error)) from error
    sizes = {item.rfilename: item.size for item in listed}
    total = 0
    for file in found.files:
        held = [n for n in sizes if n == file or (file.endswith("/") and n.startswith(file))]
        if not held:
            raise ValueError(
                f"{found.repo} has no {file} any more: its authors may have moved it. "
                f"Look for it on {found.page} and put it at {found.folder / file}."
            )
        total += sum(sizes[name] for name in held)
    return total


def _check_disk(found: Download, size: int) -> None:
    free = free_disk()
    if size > free:
        raise ValueError(
            f"{found.name} takes {format_bytes(size)}, and {format_bytes(free)} are free for "
            f"{found.folder}. Free some space, or set LIGHTNING_KV_MODELS to a folder on a larger "
            "disk."
        )


def _failed(found: Download, why: str) -> str:
    return (
        f"{found.name} was not downloaded from {found.repo}: {why}. Try again, or run this where "
        f"there is a network and copy the folder here: `{found.command}`."
    )
