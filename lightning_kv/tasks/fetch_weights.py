"""Download the published weights of metrics."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from lightning_kv.metrics.backbones.weights import (
    Weights,
    WeightsUnavailable,
    check_licence,
    locate,
    published,
    verified,
    weights_folder,
)
from lightning_kv.tasks.download import DownloadFailed, download, download_from_hub
from lightning_kv.utilities.formatting import format_bytes


def fetch_weights(name: str, accept: Collection[str] = (), force: bool = False) -> list[str]:
    """Download what a metric looks through, and check its checksum where one is published.

    Args:
        name: Name in the manifest, such as ``dino-vitb16``.
        accept: Licences accepted for weights that forbid commercial use.
        force: Download again what is here already.

    Returns:
        Sentences for the terminal.

    Raises:
        ValueError: No such name, nothing to download, no hub client, or the download failed.
        WeightsUnavailable: A licence was not accepted.
    """
    weights = published(name)
    check_licence(weights, accept)
    with suppress(WeightsUnavailable):
        found = locate(name, accept=accept)
        if not force:
            return [f"{name} is already here, in {found}. Nothing was downloaded."]
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
    return [f"{name} is in {place}. SHA-256 {digest} ({checked})."]


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


def terms(name: str) -> str:
    """Whose it is and under which terms; to be read before downloading."""
    weights = published(name)
    size = "" if weights.size is None else f" {format_bytes(weights.size)}."
    return f"{name} comes from {weights.page}. Licence: {weights.licence}.{size}"
