"""Traces come back from disk as they were written, and half a file is never left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_kv.runs.traces import read_traces, write_traces

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\\:"), min_size=1, max_size=12)
ARRAYS = st.fixed_dictionaries(
    {
        "held": arrays.arrays(np.uint8, (2, 3, 1, 4)),
        "read": arrays.arrays(np.uint8, (2, 3, 3, 1, 4)),
        "weight": arrays.arrays(np.float16, (2, 3, 1, 4)),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, ARRAYS, max_size=3))
def test_a_round_trip_changes_nothing(tmp_path_factory: pytest.TempPathFactory, traces) -> None:
    path = tmp_path_factory.mktemp("traces") / "k.npz"
    write_traces(path, traces)
    back = read_traces(path)
    assert list(back) == list(traces)
    for policy, named in traces.items():
        assert list(back[policy]) == list(named)
        for name, array in named.items():
            assert back[policy][name].dtype == array.dtype
            np.testing.assert_array_equal(back[policy][name], array)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.npz"
    write_traces(path, {"full": {"held": np.ones((1, 1, 1, 3), np.uint8)}})

    def full_disk(file: object, **_: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_traces(path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["k.npz"]
    assert read_traces(path)["full"]["held"].sum() == 3


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"PK\x03\x04 cut"])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "k.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"A trace cannot be read.*k\.npz.*Remove it"):
        read_traces(path)
