"""The catalogue: facts that can be derived elsewhere, and where weights are looked for."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from lightning_kv.models import build_model
from lightning_kv.models.catalogue import (
    CATALOGUE,
    PARTS,
    by_file_name,
    parts_folder,
)
from lightning_kv.models.sizes import PRESETS


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    """No models, no cache, and nothing that could reach a network."""
    from huggingface_hub import constants

    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")


def cached(tmp_path: Path, repo: str, *names: str) -> Path:
    """Files laid out as the hub client keeps them."""
    home = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    put(home, "refs/main")
    (home / "refs" / "main").write_text("c0ffee")
    put(home / "snapshots" / "c0ffee", *names)
    return home / "snapshots" / "c0ffee"


def on_the_published_table(steps, shift):
    """What the originals do: shift a table of 1000 levels, then take entry ``1000 - step``."""
    table = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    table = 1000 * shift * table / (1 + (shift - 1) * table)
    return tuple(table[1000 - step].item() for step in steps)


SCHEDULES = {
    "self-forcing": ((1000, 750, 500, 250), 5.0),
    "self-forcing-sid": ((1000, 750, 500, 250), 5.0),
    "self-forcing-diffusers": ((1000, 750, 500, 250), 5.0),
    "causal-forcing": ((1000, 750, 500, 250), 5.0),
    "causal-forcing-frame": ((1000, 750, 500, 250), 5.0),
    "causal-forcing-2step": ((1000, 500), 5.0),
    "causal-forcing-1step": ((1000,), 5.0),
    "causal-forcing-long": ((1000, 800, 600, 400, 200), 5.0),
    "rolling-forcing": ((1000, 800, 600, 400, 200), 5.0),
    "longlive": ((1000, 750, 500, 250), 5.0),
    "causvid-4step": ((1000, 750, 500, 250), 8.0),
}
AS_GIVEN = {"causvid": (1000, 757, 522), "krea-14b": (1000, 937, 833, 625)}


def test_noise_levels_are_those_of_the_originals():
    assert set(SCHEDULES) | set(AS_GIVEN) == set(CATALOGUE)
    for name, (steps, shift) in SCHEDULES.items():
        want = on_the_published_table(steps, shift)
        assert CATALOGUE[name].config.timesteps == pytest.approx(want, abs=1e-9), name
    for name, want in AS_GIVEN.items():
        assert CATALOGUE[name].config.timesteps == want
    four = on_the_published_table((1000, 750, 500, 250), 5.0)
    firsts = {n: one.config.first_timesteps for n, one in CATALOGUE.items()}
    assert {n for n, levels in firsts.items() if levels} == {
        "causal-forcing-1step",
        "causal-forcing-2step",
    }
    assert all(levels == pytest.approx(four, abs=1e-9) for levels in firsts.values() if levels)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_entry_is_complete_and_says_only_what_differs(name):
    one = CATALOGUE[name]
    preset = PRESETS[one.preset]
    assert one.name == name and one.files and not Path(one.files[0]).is_absolute()
    assert one.repo.count("/") == one.project.count("/") == 1
    assert set(one.changes) <= {field.name for field in fields(preset)}
    assert all(getattr(preset, key) != value for key, value in one.changes.items())
    assert one.config.dim == preset.dim and "." in one.about and one.licence
    hash(one)


def test_chunks_samplers_and_horizons():
    config = {name: one.config for name, one in CATALOGUE.items()}
    assert {n for n, c in config.items() if c.chunk == 1} == {
        "causal-forcing-frame",
        "causal-forcing-2step",
        "causal-forcing-1step",
    }
    rolling = {n for n, c in config.items() if c.sampler == "rolling"}
    assert rolling == {"causal-forcing-long", "rolling-forcing"}
    assert rolling == {n for n, one in CATALOGUE.items() if one.policy == "rolling-forcing"}
    assert {n: c.train_horizon for n, c in config.items() if c.train_horizon != 21} == {
        "longlive": 240
    }


def test_sizes_follow_from_the_number_of_parameters():
    counts = {
        preset: sum(p.numel() for p in build_model(preset, "meta").parameters())
        for preset in ("wan-1.3b", "wan-14b")
    }
    bytes_each = {"self-forcing": 4, "causal-forcing": 4, "rolling-forcing": 3 * 4, "krea-14b": 2}
    assert {n for n, one in CATALOGUE.items() if one.size is not None} == set(bytes_each)
    for name, size in bytes_each.items():
        one = CATALOGUE[name]
        assert one.size == pytest.approx(counts[one.preset] * size, rel=0.01)


def test_policies_are_presets():
    from lightning_kv.policies.registry import preset

    for one in CATALOGUE.values():
        if one.policy != "rolling-forcing":  # a preset of its own sampler
            assert preset(one.policy).name == one.policy
    # window 12 with sink 3: 9 history frames, 3 of them the sink
    retain = preset(CATALOGUE["longlive"].policy).retain
    assert (retain.sink, retain.budget.amount) == (3, "9f")


def test_weights_are_found_in_the_models_folder_first_then_in_the_hub_cache(tmp_path):
    one = CATALOGUE["self-forcing"]
    assert one.path is None and one.lora is None
    snapshot = cached(tmp_path, one.repo, one.files[0])
    assert one.path == snapshot / one.files[0]
    put(one.folder, one.files[0])
    assert one.path == tmp_path / "models" / "self-forcing" / "checkpoints" / "self_forcing_dmd.pt"


def test_a_checkpoint_without_its_lora_is_not_here():
    one = CATALOGUE["longlive"]
    put(one.folder, one.files[0])
    assert one.path is None and one.lora is None
    put(one.folder, one.files[1])
    assert one.path == one.folder / one.files[0]
    assert one.lora == one.folder / one.files[1]


def test_a_folder_counts_with_all_its_shards(tmp_path):
    one = CATALOGUE["self-forcing-diffusers"]
    put(one.folder / "transformer", "config.json")
    assert one.path is None
    index = one.folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    put(one.folder / "transformer", "1.safetensors")
    assert one.path is None
    put(one.folder / "transformer", "2.safetensors")
    assert one.path == one.folder / "transformer"
    index.write_text('{"weight_map": {"a"')
    assert one.path is None
    index.unlink()
    assert one.path == one.folder / "transformer"
    snapshot = cached(
        tmp_path, one.repo, "transformer/config.json", "transformer/model.safetensors"
    )
    (one.folder / "transformer" / "config.json").unlink()
    assert one.path == snapshot / "transformer"


PARTS_FILES = (
    "tokenizer/tokenizer_config.json",
    "tokenizer/spiece.model",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)


@pytest.mark.parametrize("missing", [None, *range(len(PARTS_FILES))])
def test_parts_are_one_folder_with_three_whole_ones(tmp_path, missing):
    files = [name for i, name in enumerate(PARTS_FILES) if i != missing]
    snapshot = cached(tmp_path, PARTS["wan2.1-parts"].repo, *files)
    assert parts_folder() == (snapshot if missing is None else None)
    put(tmp_path / "models" / "wan2.1-parts", *files)
    here = tmp_path / "models" / "wan2.1-parts"
    assert parts_folder() == (here if missing is None else None)


def test_without_the_hub_client_only_the_models_folder_is_looked_at(monkeypatch, tmp_path):
    one = CATALOGUE["self-forcing"]
    cached(tmp_path, one.repo, one.files[0])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert one.path is None
    put(one.folder, one.files[0])
    assert one.path == one.folder / one.files[0]


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_weights_file_is_recognised_where_its_place_in_the_repository_is_kept(name):
    one = CATALOGUE[name]
    found = by_file_name(Path("/somewhere") / one.files[0])
    assert found is (None if one.files[0].endswith("/") else one)


def test_a_bare_name_is_recognised_where_one_entry_has_it():
    assert by_file_name("self_forcing_dmd.pt").name == "self-forcing"
    assert by_file_name("/x/longvideo.pt").name == "causal-forcing-long"
    assert by_file_name(Path("krea-realtime-video-14b.safetensors")).name == "krea-14b"
    for shared in ("model.pt", "causal_forcing.pt", "lora.pt", "transformer", "mine.pt", ""):
        assert by_file_name(shared) is None, shared
