"""Where downloads lie on this machine; the network is never asked."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def models_folder() -> Path:
    """Where downloads go: ``$LIGHTNING_KV_MODELS``, or ``~/.cache/lightning_kv``."""
    given = os.environ.get("LIGHTNING_KV_MODELS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "lightning_kv"


def free_disk() -> int:
    """Free bytes on the disk that :func:`models_folder` is on, or will be."""
    folder = models_folder().absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def has_hub() -> bool:
    """Whether the client of the model hub is installed."""
    return importlib.util.find_spec("huggingface_hub") is not None


def hub_copy(repo: str, file: str) -> Path | None:
    """A file of a repository in the hub's own cache; None where it is not there."""
    if not has_hub():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None
