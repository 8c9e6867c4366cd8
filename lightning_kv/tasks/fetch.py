"""Download published checkpoints, and the text encoder and VAE that they need."""

from __future__ import annotations

from lightning_kv.metrics.backbones.weights import first_line
from lightning_kv.models.catalogue import Download, entry, free_disk
from lightning_kv.tasks.download import DownloadFailed, download_from_hub, need_hub
from lightning_kv.utilities.formatting import format_bytes


def fetch(name: str, force: bool = False) -> list[str]:
    """Download a published checkpoint, or the parts that all of them need.

    Args:
        name: Name in the catalogue, such as ``self-forcing`` or ``wan2.1-parts``.
        force: Download again what is here already.

    Returns:
        Sentences for the terminal, the licence first.

    Raises:
        ValueError: No such name, no hub client, too little disk, or the download failed.
    """
    found = entry(name)
    words = [notice(found)]
    root = found.root
    if root is not None and not force:
        return [*words, f"{name} is already here, in {root}. Nothing was downloaded."]
    size = _download(found, force)
    return [*words, f"{name} is in {found.folder}: {format_bytes(size)}."]


def notice(found: Download) -> str:
    """Whose it is and under which terms; to be read before downloading."""
    return f"{found.name} comes from {found.page}. Licence: {found.licence}."


def _download(found: Download, force: bool) -> int:
    """Bring the files here; returns their size in bytes."""
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
    return size


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
