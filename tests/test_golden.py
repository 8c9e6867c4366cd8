"""Trajectories of the original Self Forcing network, recorded elsewhere, on random weights."""

import ast
from pathlib import Path

import pytest
from safetensors import safe_open

from lightning_kv.cache.session import CacheSession
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.presets import policy_from_dict
from lightning_kv.rollout import rollout

FILE = Path(__file__).parents[2] / "shared" / "golden" / "self_forcing_reference.safetensors"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="the recorded trajectories are not here")

# A window counts the current chunk, a budget does not.
POLICIES = {
    "latents.full": {},
    "latents.window6": {"retain": {"part": "window", "budget": "3f"}},
    "latents.window9_sink1": {"retain": {"part": "window", "sink": 1, "budget": "6f"}},
}


@pytest.fixture(scope="module")
def golden():
    with safe_open(FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, ast.literal_eval(  # noqa: SIM118
            file.metadata()["config"]
        )


@pytest.fixture(scope="module")
def model(golden):
    tensors, made = golden
    config = WanConfig(
        dim=made["dim"],
        ffn_dim=made["ffn_dim"],
        layers=made["num_layers"],
        heads=made["num_heads"],
        patch=made["patch_size"],
        text_dim=made["text_dim"],
        latent_size=(made["H"], made["W"]),
        timesteps=tuple(tensors["warped_timesteps"].tolist()),
    )
    network = CausalWan(config)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    network.load_state_dict(weights, strict=True)
    return VideoModel(network, codec=None, encoder=lambda prompts: tensors["context"])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", POLICIES)
def test_latents_equal_the_original(golden, model, name, backend):
    tensors, _ = golden
    noise, again = tensors["noise"], tensors["renoise"]

    def recorded(chunk, step):
        return noise[:, 3 * chunk : 3 * chunk + 3] if step == 0 else again[:, chunk, step - 1]

    policy = policy_from_dict({"name": name, **POLICIES[name]})
    out = rollout(model, policy, "recorded", 15, noise=recorded, backend=backend, decode=False)
    assert isinstance(out.session, CacheSession)
    worst = (out.latents - tensors[name]).abs().max()
    assert worst <= 1e-5, f"largest difference {worst:.2e}"
    if name != "latents.full":
        assert (out.latents - tensors["latents.full"]).abs().max() > 1e-2
