"""Download the published weights of metrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from lightning_kv.metrics.backbones.weights import (
    Weights,
    WeightsUnavailable,
    check_licence,
    first_line,
    locate,
    published,
    verified,
    weights_folder,
)


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
    folder = weights_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    if weights.repo:
        _from_hub(weights, folder, force)
    else:
        _from_address(weights, folder / weights.file)
    place = locate(name, accept=accept)
    try:
        digest = verified(place, weights)
    except ValueError:  # or the next fetch would find it here
        if folder in place.parents:
            place.unlink(missing_ok=True)
        raise
    checked = "as published" if weights.sha256 else "no checksum is published to compare with"
    return [f"{name} is in {place}. SHA-256 {digest} ({checked})."]


def terms(name: str) -> str:
    """Whose it is and under which terms; to be read before downloading."""
    weights = published(name)
    size = "" if weights.size is None else f" {weights.size / 1e6:.3g} MB."
    return f"{name} comes from {weights.page}. Licence: {weights.licence}.{size}"


def _from_hub(weights: Weights, folder: Path, force: bool) -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{weights.name} cannot be downloaded: huggingface_hub is not installed. Install it "
            'with `pip install "lightning_kv[wan]"`.'
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        snapshot_download(
            weights.repo,
            local_dir=folder,
            allow_patterns=list(weights.path) or None,
            force_download=force,
        )
    except (OSError, HTTPError) as error:
        raise _failed(weights, error) from error


def _from_address(weights: Weights, path: Path) -> None:
    from torch.hub import download_url_to_file  # temporary file, checksum, then renamed

    try:
        download_url_to_file(weights.url, str(path), hash_prefix=weights.sha256 or None)
    except (OSError, RuntimeError) as error:
        raise _failed(weights, error) from error


def _failed(weights: Weights, error: Exception) -> ValueError:
    return ValueError(
        f"{weights.name} was not downloaded from {weights.page}: {first_line(error)}. Try again, "
        f"or copy it from elsewhere to {weights_folder(weights.name)}."
    )
