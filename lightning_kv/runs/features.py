"""Features of clips on disk: what metrics of sets are computed from.

``features/policies/POLICY/KEY.npz`` and ``features/real/KEY.npz`` hold, by the name of an encoder,
float32 ``[windows, d]``: what it makes of the consecutive windows of a clip. How names become those
of files says :func:`part_of_path`.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_kv.utilities.files import write_atomic

Features = Mapping[str, NDArray[np.float32]]
"""Features of the windows of one clip, ``[windows, d]``, by the name of an encoder."""


def part_of_path(name: str) -> str:
    """The name of a policy or clip as part of a path; names that differ stay apart.

    >>> part_of_path("top-attention@9f"), part_of_path("a/b")
    ('top-attention@9f', 'a_b-c14cddc0')
    """
    plain = re.sub(r"^\.+|[^\w@.+-]+", "_", name)[:100]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class FeatureStore:
    """The features of a run. The name of a set is that of a policy; None is the real set.

    Args:
        folder: Where they are, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str | None, key: str, features: Features) -> None:
        """Keep the features of a clip, also where none could be made; a whole file or none."""
        path = self._path(name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        np.savez(file, **features)
        write_atomic(path, file.getvalue())

    def has(self, name: str | None, key: str) -> bool:
        """Whether the features of a clip are there."""
        return self._path(name, key).is_file()

    def read(self, name: str | None, key: str) -> dict[str, NDArray[np.float32]] | None:
        """The features of a clip; None where there are none.

        Raises:
            ValueError: The file is damaged.
        """
        path = self._path(name, key)
        return _load(path) if path.is_file() else None

    def rows(self, name: str | None, encoder: str) -> tuple[NDArray[np.float32], list[str]]:
        """Features ``[n, d]`` of a whole set, and for each the part of a path that is its clip's.

        Raises:
            ValueError: A file is damaged.
        """
        found, keys = [], []
        for path in sorted(self._folder(name).glob("*.npz")):
            features = _load(path)
            if encoder not in features:  # it could not judge this clip, which its record says
                continue
            found.append(features[encoder])
            keys += [path.stem] * len(found[-1])
        return (np.concatenate(found) if found else np.empty((0, 0), np.float32)), keys

    def _folder(self, name: str | None) -> Path:
        return self.folder / ("real" if name is None else f"policies/{part_of_path(name)}")

    def _path(self, name: str | None, key: str) -> Path:
        return self._folder(name) / f"{part_of_path(key)}.npz"


def _load(path: Path) -> dict[str, NDArray[np.float32]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read as features of clips ({type(error).__name__}: {error}). Remove it, "
        "and take the run up again."
    )
