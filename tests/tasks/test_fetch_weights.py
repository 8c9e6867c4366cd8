"""Downloads of metric weights, with the network replaced by files."""

import hashlib

import pytest
import torch

from lightning_kv.metrics.backbones import weights as manifest
from lightning_kv.metrics.backbones.weights import WeightsUnavailable, locate, published
from lightning_kv.tasks.fetch_weights import fetch_weights, terms


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def test_a_file_is_downloaded_checked_and_found(home, monkeypatch):
    asked = []

    def download(url, path, hash_prefix=None):
        asked.append((url, hash_prefix))
        with open(path, "wb") as file:
            file.write(b"weights")

    digest = hashlib.sha256(b"weights").hexdigest()
    entry = published("alexnet")
    changed = type(entry)(**{**vars(entry), "sha256": digest[:8]})
    monkeypatch.setitem(manifest.WEIGHTS, "alexnet", changed)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    (said,) = fetch_weights("alexnet")
    assert digest in said and "as published" in said
    assert asked == [(entry.url, digest[:8])]
    assert locate("alexnet").read_bytes() == b"weights"
    assert "already here" in fetch_weights("alexnet")[0] and len(asked) == 1
    fetch_weights("alexnet", force=True)
    assert len(asked) == 2


def test_a_file_with_another_checksum_does_not_stay(home, monkeypatch):
    def download(url, path, hash_prefix=None):
        with open(path, "wb") as file:
            file.write(b"something else")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with pytest.raises(ValueError, match="is not the published 'alexnet'"):
        fetch_weights("alexnet")
    with pytest.raises(WeightsUnavailable):
        locate("alexnet")


def test_no_network_is_said_to_be_none(home, monkeypatch):
    def download(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with pytest.raises(ValueError, match=r"was not downloaded .*not known.*copy it"):
        fetch_weights("alexnet")


def test_a_licence_is_asked_for_before_anything_else(home):
    assert "CC-BY-NC-SA-4.0" in terms("musiq-spaq")
    with pytest.raises(WeightsUnavailable, match=r"--accept_license CC-BY-NC-SA-4.0"):
        fetch_weights("musiq-spaq")


def test_what_nobody_publishes_cannot_be_fetched(home):
    with pytest.raises(ValueError, match=r"cannot be downloaded.*METRIC/amt-s=FILE"):
        fetch_weights("amt-s", accept=["cc-by-nc-sa-4.0"])
    with pytest.raises(ValueError, match="Did you mean 'alexnet'"):
        fetch_weights("alexnett")
