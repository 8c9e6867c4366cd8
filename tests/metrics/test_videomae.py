"""Clip transformers against a forward written out by hand, on tiny random networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_kv.metrics.backbones.videomae import (
    GIANT,
    VideoMAE,
    VideoTransformer,
    read_published,
)

transformers = pytest.importorskip("transformers")

TINY = {
    "image_size": 28,
    "patch_size": 14,
    "num_frames": 4,
    "tubelet_size": 2,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random parameters, named and shaped as in the files of the VideoMAE-v2 project."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = TINY["hidden_size"], TINY["intermediate_size"]
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 14, 14),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (174, width),
        "head.bias": (174,),
    }
    for layer in range(TINY["num_hidden_layers"]):
        block = f"blocks.{layer}."
        shapes |= {
            f"{block}norm1.weight": (width,),
            f"{block}norm1.bias": (width,),
            f"{block}attn.q_bias": (width,),
            f"{block}attn.v_bias": (width,),
            f"{block}attn.qkv.weight": (3 * width, width),
            f"{block}attn.proj.weight": (width, width),
            f"{block}attn.proj.bias": (width,),
            f"{block}norm2.weight": (width,),
            f"{block}norm2.bias": (width,),
            f"{block}mlp.fc1.weight": (inner, width),
            f"{block}mlp.fc1.bias": (inner,),
            f"{block}mlp.fc2.weight": (width, inner),
            f"{block}mlp.fc2.bias": (width,),
        }
    return {k: torch.randn(s, generator=generator) * 0.3 for k, s in shapes.items()}


def by_hand(state: dict[str, torch.Tensor], clips: torch.Tensor) -> torch.Tensor:
    """Features of clips ``[B, T, 3, 28, 28]``, from the paper's description, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    width, heads = TINY["hidden_size"], TINY["num_attention_heads"]

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    tokens = []
    for time in range(0, TINY["num_frames"], 2):
        for row in range(2):
            for column in range(2):
                rows = slice(14 * row, 14 * row + 14)
                columns = slice(14 * column, 14 * column + 14)
                patch = clips[:, time : time + 2, :, rows, columns].double().transpose(1, 2)
                kernel = state["patch_embed.proj.weight"].flatten(1)
                tokens.append(patch.flatten(1) @ kernel.T + state["patch_embed.proj.bias"])
    x = torch.stack(tokens, 1)
    for position in range(x.shape[1]):
        for channel in range(width):
            angle = position / 10000 ** (2 * (channel // 2) / width)
            x[:, position, channel] += math.cos(angle) if channel % 2 else math.sin(angle)
    for layer in range(TINY["num_hidden_layers"]):
        block = f"blocks.{layer}."
        y = norm(x, f"{block}norm1")
        weights = state[f"{block}attn.qkv.weight"].split(width)
        biases = (state[f"{block}attn.q_bias"], 0, state[f"{block}attn.v_bias"])
        q, k, v = (y @ w.T + b for w, b in zip(weights, biases, strict=True))
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = (q @ k.mT / math.sqrt(width // heads)).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}attn.proj")
        inner = linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")
        x = x + linear(inner * (1 + torch.erf(inner / math.sqrt(2))) / 2, f"{block}mlp.fc2")
    return norm(x.mean(1), "fc_norm")


def tiny(state: dict[str, torch.Tensor]) -> VideoMAE:
    return VideoMAE(*read_published(state, "tiny.pth", TINY))


def test_the_published_layout_gives_the_features_written_out_by_hand():
    clips = torch.rand(2, 4, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = by_hand(published_state(), clips)
    found = tiny(published_state())(clips)
    assert found.dtype == torch.float32 and found.shape == (2, 24)
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("key", ["module", "model"])
def test_half_precision_under_a_key_is_read_as_float32(key):
    half = {name: tensor.half() for name, tensor in published_state().items()}
    clips = torch.rand(1, 4, 3, 28, 28)
    encoder, norm = read_published({key: half}, "half.pth", TINY)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    expected = by_hand({name: tensor.float() for name, tensor in half.items()}, clips)
    torch.testing.assert_close(
        VideoMAE(encoder, norm)(clips).double(), expected, rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", ["blocks.1.attn.v_bias", "fc_norm.weight", "blocks.0.norm1.bias"])
def test_a_missing_parameter_is_an_error(name):
    state = published_state()
    del state[name]
    with pytest.raises(ValueError, match=r"broken\.pth does not fit"):
        read_published(state, "broken.pth", TINY)


@pytest.mark.parametrize("name", ["blocks.0.gamma_1", "cls_token", "blocks.0.attn.k_bias"])
def test_a_parameter_left_over_is_an_error(name):
    state = published_state() | {name: torch.zeros(24)}
    with pytest.raises(ValueError, match="does not fit"):
        read_published(state, "other.pth", TINY)


def test_frames_are_squashed_and_not_normalised():
    clips = torch.rand(1, 4, 3, 20, 44)
    squashed = F.interpolate(clips[0], (28, 28), mode="bilinear", align_corners=False)
    expected = by_hand(published_state(), squashed[None])
    torch.testing.assert_close(
        tiny(published_state())(clips).double(), expected, rtol=2e-4, atol=2e-5
    )


def test_clips_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"Pass \[clips, 4, 3, height, width\]"):
        tiny(published_state())(torch.rand(1, 5, 3, 28, 28))


def test_the_published_giant_has_a_billion_parameters():
    # 1,011 million with the classifier, says the paper (1.01 B); counted here from the sizes.
    config = transformers.VideoMAEConfig(**GIANT, qkv_bias=True, use_mean_pooling=True)
    with torch.device("meta"):
        layer = transformers.models.videomae.modeling_videomae.VideoMAELayer(config)
    count = 40 * sum(p.numel() for p in layer.parameters())
    count += 1408 * (3 * 2 * 14 * 14 + 1) + 2 * 1408 + 174 * 1409
    assert count == pytest.approx(1.011e9, rel=2e-3)


def test_another_file_is_not_taken_for_the_published_one(tmp_path):
    path = tmp_path / "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
    torch.save(published_state(), path)
    with pytest.raises(ValueError, match="is not the published 'videomae-ssv2'"):
        VideoMAE.load(path)


def video_folder(tmp_path, kind: str):
    torch.manual_seed(3)
    if kind == "videomae":
        net = transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY))
    else:
        net = transformers.VJEPA2Model(
            transformers.VJEPA2Config(
                patch_size=14,
                crop_size=28,
                frames_per_clip=4,
                hidden_size=36,
                num_attention_heads=3,
                num_hidden_layers=2,
                pred_hidden_size=36,
                pred_num_attention_heads=3,
                pred_num_hidden_layers=1,
            )
        )
    net.save_pretrained(tmp_path)
    return net.eval()


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_a_folder_of_transformers_gives_its_own_mean_token(tmp_path, kind):
    net = video_folder(tmp_path, kind)
    backbone = VideoTransformer.load(tmp_path)
    clips = np.random.default_rng(0).random((3, 4, 3, 28, 28), dtype=np.float32)
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
    deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
    with torch.no_grad():
        tokens = net(torch.from_numpy((clips - mean) / deviation)).last_hidden_state
    expected = torch.stack([clip_tokens.sum(0) / len(clip_tokens) for clip_tokens in tokens])
    found = backbone(torch.from_numpy(clips))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (backbone.num_features, backbone.clip_len) == (found.shape[1], 4)
    assert backbone.name == f"transformers-{kind}" and not backbone.comparable
    assert len(backbone.weights_sha256) == 64 and not backbone.train().training
    assert "not a recipe of the literature" in backbone.recipe


def test_a_folder_that_lacks_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    video_folder(tmp_path, "videomae")
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing, encoder"):
        VideoTransformer.load(tmp_path)


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a video encoder"):
        VideoTransformer.load(tmp_path / "nothing")
    small = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.ViTModel(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vit' is not known as a video encoder"):
        VideoTransformer.load(tmp_path)


def test_lengths_that_a_network_cannot_take_are_refused(tmp_path):
    video_folder(tmp_path / "mae", "videomae")
    with pytest.raises(ValueError, match=r"clips of 6 frames\. Pass 4\."):
        VideoTransformer.load(tmp_path / "mae", clip_len=6)
    video_folder(tmp_path / "jepa", "vjepa2")
    assert VideoTransformer.load(tmp_path / "jepa", clip_len=6).clip_len == 6
    with pytest.raises(ValueError, match="a multiple of 2"):
        VideoTransformer.load(tmp_path / "jepa", clip_len=5)
