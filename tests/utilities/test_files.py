"""Files are there whole or not at all, and their checksums are those of hashlib."""

import hashlib
import os

import pytest

from lightning_kv.utilities.files import checksum, replacing, write_atomic


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_atomic(file, "grüße")
    assert contents(tmp_path) == {"summary.json": "grüße".encode()}
    write_atomic(file, b"\x00\xff")

    def full_disk(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, "new")
    assert contents(tmp_path) == {"summary.json": b"\x00\xff"}


def test_what_is_half_written_takes_no_place(tmp_path):
    file = tmp_path / "video.mp4"
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert contents(tmp_path) == {}
    with replacing(file) as temporary:
        temporary.write_bytes(b"whole")
        assert not file.exists()
    assert contents(tmp_path) == {"video.mp4": b"whole"}


def test_checksums(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(os.urandom(3 << 20))
    two.write_bytes(b"")
    assert checksum(one) == hashlib.sha256(one.read_bytes()).hexdigest()
    two.write_bytes(b"more")
    assert checksum(one, two) == hashlib.sha256(one.read_bytes() + b"more").hexdigest()
