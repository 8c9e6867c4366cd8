"""Sizes of networks: counted as modules have them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.models.sizes import PRESETS, parameters
from lightning_kv.models.wan import CausalWan, WanConfig


def counted(config):
    with torch.device("meta"):
        return sum(weight.numel() for weight in CausalWan(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_the_number_of_weights_of_every_preset(name):
    assert parameters(PRESETS[name]) == counted(PRESETS[name])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 40), min_size=6, max_size=6))
def test_the_number_of_weights_of_any_size(layers, heads, sizes):
    head, ffn, channels, side, text, freq = sizes
    config = WanConfig(
        dim=heads * head,
        ffn_dim=ffn,
        layers=layers,
        heads=heads,
        channels=channels,
        patch=(1, side, 2),
        text_dim=text,
        freq_dim=2 * freq,
    )
    assert parameters(config) == counted(config)


def test_nothing_is_made_to_count():
    """Making a network loads torch's compiler, which takes longer than all else of a listing."""
    code = (
        "import sys; from lightning_kv.models.sizes import PRESETS, parameters; "
        "parameters(PRESETS['wan-14b']); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
