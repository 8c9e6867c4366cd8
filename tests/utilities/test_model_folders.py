"""Where downloads lie."""

from lightning_kv.metrics.backbones.weights import weights_folder
from lightning_kv.models.catalogue import CATALOGUE
from lightning_kv.utilities.model_folders import free_disk, hub_copy, models_folder


def test_models_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    assert models_folder() == tmp_path / "models" and not models_folder().exists()
    assert free_disk() > 0
    monkeypatch.delenv("LIGHTNING_KV_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".cache" / "lightning_kv"
    monkeypatch.setenv("LIGHTNING_KV_MODELS", "~/weights")
    assert models_folder() == tmp_path / "weights"
    assert weights_folder("i3d") == tmp_path / "weights" / "metrics" / "i3d"
    assert CATALOGUE["self-forcing"].folder == tmp_path / "weights" / "self-forcing"


def test_a_file_in_the_hubs_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_copy("a/b", "c/d.bin") is None
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    (snapshot / "c").mkdir(parents=True)
    (snapshot / "c" / "d.bin").write_bytes(b"d")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("123")
    assert hub_copy("a/b", "c/d.bin") == snapshot / "c" / "d.bin"
    assert hub_copy("a/b", "c/e.bin") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hub_copy("a/b", "c/d.bin") is None
