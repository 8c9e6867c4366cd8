"""Files: written whole or not at all, and told apart by what is in them."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol


class Opens(Protocol):
    """A path, or what opens as one does."""

    def open(self, mode: str) -> IO[Any]:
        """Open it."""
        ...


def checksum(*files: Opens) -> str:
    """SHA-256 of a file, or of several one after the other, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing; a reader never sees half of it."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place if all goes well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
