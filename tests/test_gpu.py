"""The same numbers on a CUDA GPU. The CPU twins of these tests are in test_rollout.py."""

import pytest
import torch

from lightning_kv import load_model, preset, rollout
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.registry import policy_from_dict, presets, sized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
COMBINATION = {
    "name": "mix",
    "retain": {"part": "window", "sink": 3, "budget": "12f"},
    "select": {"part": "top-attention", "budget": "6f", "per_query_frame": True},
    "positions": "contiguous",
    "precision": {"part": "aged", "codec": "int8", "age": 3},
}
POLICIES = [preset(sized(name, "6f")) for name in presets(without_tables=True, any_model=True)] + [
    policy_from_dict(COMBINATION)
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_gpu_equals_cpu(policy):
    model = load_model()
    runs = []
    for device in ("cpu", "cuda"):
        network = CausalWan(model.network.config).double()
        network.load_state_dict(model.network.state_dict())
        moved = VideoModel(
            network.eval().to(device), model.codec.to(device), model.encoder.to(device)
        )
        runs.append(rollout(moved, policy, ["dusk fast n10 left", "mist fast n7 left"], 24))
    assert (runs[0].latents - runs[1].latents.cpu()).abs().max() <= 1e-6
    assert [c.rows_read for c in runs[0].costs] == [c.rows_read for c in runs[1].costs]
    assert [c.peak_bytes for c in runs[0].costs] == [c.peak_bytes for c in runs[1].costs]
