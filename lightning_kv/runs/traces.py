"""Traces on disk: which past frames every policy kept and read, one file per prompt.

A file is a compressed numpy archive of arrays named ``POLICY/held``, ``POLICY/read`` and
``POLICY/weight``; :mod:`lightning_kv.cache.trace` says what they hold.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_kv.utilities.files import replacing

Traces = dict[str, dict[str, NDArray]]


def write_traces(path: str | Path, traces: Traces) -> None:
    """Write the traces of all policies for one prompt; a whole file or none.

    Args:
        path: File to write, such as ``RUN/traces/KEY.npz``.
        traces: Arrays by name, by policy.
    """
    named = {
        f"{policy}/{name}": array
        for policy, arrays in traces.items()
        for name, array in arrays.items()
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **named)


def read_traces(path: str | Path) -> Traces:
    """Arrays by name, by policy, in the order in which they were written.

    Raises:
        ValueError: The file is missing or damaged.
    """
    found: Traces = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                policy, name = key.rsplit("/", 1)
                found.setdefault(policy, {})[name] = archive[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"A trace cannot be read. {path} gave {type(error).__name__}: {error}. Remove it: the "
            "report is then made without it."
        ) from error
    return found
