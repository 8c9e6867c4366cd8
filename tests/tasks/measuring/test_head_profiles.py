"""Statistics of heads from rollouts, as settings of policies read them."""

import json

import pytest
import torch

from lightning_kv import rollout
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.tasks.measuring.head_profiles import query_statistics


def test_means_of_queries_are_what_tri_attention_reads(panorama, tmp_path):
    """Of two clips: the mean of what each alone gives, since both ask equally often."""
    prompts, path = ["dusk fast n10 left", "noon fast n10 left"], tmp_path / "queries.json"
    both, first, last = (
        query_statistics(panorama, p, 6) for p in (prompts, prompts[:1], prompts[1:])
    )
    for name in ("mean", "length"):
        each = (torch.tensor(own[name]) for own in (first, last))
        torch.testing.assert_close(torch.tensor(both[name]), sum(each) / 2, atol=1e-4, rtol=1e-4)
    path.write_text(json.dumps(both))
    part = {"part": "tri-attention", "budget": "6f", "statistics": str(path)}
    made = policy_from_dict({"name": "x", "retain": part})
    assert rollout(panorama, made, prompts[0], 12, decode=False).latents.shape[1] == 12
    with pytest.raises(ValueError, match="no prompts"):
        query_statistics(panorama, [], 6)
