"""The embedded model's file: what is in it, and in and out without loss."""

import json

import pytest
import torch
import yaml

from lightning_kv.models import load_model
from lightning_kv.models.embedded import WEIGHTS, read_weights, save_embedded
from lightning_kv.models.sizes import PRESETS

FILE = WEIGHTS / "panorama.safetensors"


def test_metadata_says_where_the_weights_come_from():
    _, found = read_weights(FILE)
    assert json.loads(found["config"])["dim"] == PRESETS["panorama"].dim
    recipe = json.loads(found["recipe"])
    with open(WEIGHTS.parents[1] / "configs" / "pretrain_panorama.yaml") as file:
        committed = yaml.safe_load(file)["recipe"]["stages"]
    for stage, ours in zip(recipe["stages"], committed, strict=True):
        assert {key: stage[key] for key in ours} == ours
    assert int(found["steps"]) == sum(stage["steps"] for stage in committed)
    assert {"loss", "mse_new", "mse_revisit"} <= json.loads(found["final_losses"]).keys()
    assert found["commit"] and "lightning-kv pretrain" in found["reproduce"]


def test_a_round_trip_keeps_every_weight(tmp_path, panorama):
    path = tmp_path / "again.safetensors"
    save_embedded(path, panorama, {"steps": "0"})
    again = load_model(str(path))
    assert again.network.config == panorama.network.config
    assert again.encoder.phrases == panorama.encoder.phrases
    for part in ("network", "codec", "encoder"):
        ours, theirs = (getattr(m, part).state_dict() for m in (panorama, again))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_missing_tensor_is_said(tmp_path):
    from safetensors.torch import save_file

    tensors, metadata = read_weights(FILE)
    del tensors["network.head.head.weight"]
    path = tmp_path / "part.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"Missing key.*head\.head\.weight"):
        load_model(str(path))
