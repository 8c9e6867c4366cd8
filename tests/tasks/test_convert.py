"""Converting there and back changes no bit, and says what it did."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_kv.models import CausalWan, WanConfig
from lightning_kv.models.checkpoints import read_checkpoint
from lightning_kv.tasks.convert import convert

TINY = WanConfig(dim=64, ffn_dim=128, layers=2, heads=2, text_dim=32)


def weights(dtype=torch.float32, config=TINY):
    torch.manual_seed(0)
    state = CausalWan(config).state_dict()
    return {k: torch.randn(v.shape).to(dtype) for k, v in state.items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_exact(tmp_path, dtype):
    first = weights(dtype)
    source, folder, back = tmp_path / "sf.pt", tmp_path / "d", tmp_path / "back.safetensors"
    torch.save({"generator_ema": {f"model.{k}": v for k, v in first.items()}}, source)
    there = convert(source, folder, "diffusers", heads=2)
    again = convert(folder, back, "original")
    assert same(read_checkpoint(back).tensors, first)
    assert (there.checkpoint.format, again.checkpoint.format) == ("original", "diffusers")
    assert (there.out, again.out) == (folder, back)


def test_mixed_dtypes_stay_as_they_are(tmp_path):
    first = weights(torch.bfloat16)
    first["head.modulation"] = first["head.modulation"].float()
    save_file(first, tmp_path / "w.safetensors")
    done = convert(tmp_path / "w.safetensors", tmp_path / "d", "diffusers", heads=2)
    assert same(read_checkpoint(tmp_path / "d").tensors, first)
    count = sum(v.numel() for v in first.values())
    assert f"69 tensors, {count:,} parameters, bfloat16 (68), float32 (1)." in done.words


def test_words_and_header_say_where_the_weights_come_from(tmp_path):
    first = weights()
    torch.save({"generator": first}, tmp_path / "base.pt")
    pair = {f"blocks.0.ffn.2.lora_{x}.weight": torch.ones(s) for x, s in (("A", 128), ("B", 64))}
    pair = {k: v[None] if "_A" in k else v[:, None] for k, v in pair.items()}
    pair["blocks.0.ffn.2.alpha"] = torch.tensor(0.5)
    save_file(pair, tmp_path / "lora.safetensors")
    out = tmp_path / "merged.safetensors"
    done = convert(
        tmp_path / "base.pt", out, "original", "generator", tmp_path / "lora.safetensors"
    )
    found = done.checkpoint
    assert done.words == [
        f"Read {tmp_path / 'base.pt'}: a torch file with original names, entry 'generator'.",
        "It holds dim 64, 2 layers, ffn 128.",
        f"69 tensors, {sum(v.numel() for v in first.values()):,} parameters, float32 (69).",
        f"SHA-256 {found.sha256}.",
        f"Merged the LoRA lora.safetensors (SHA-256 {found.lora_sha256}) at strength 0.5, "
        "by: alpha tensors.",
        f"Wrote {out} with original names.",
    ]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "source": "base.pt",
            "key": "generator",
            "sha256": found.sha256,
            "lora": "lora.safetensors",
            "lora_sha256": found.lora_sha256,
            "lora_strength": "0.5",
            "lora_strength_by": "alpha tensors",
        }
    key = "blocks.0.ffn.2.weight"
    torch.testing.assert_close(read_checkpoint(out).tensors[key], first[key] + 0.5)


def test_a_strength_that_nobody_has_said_is_said(tmp_path):
    save_file(weights(), tmp_path / "base.safetensors")
    pair = {f"head.head.lora_{x}.weight": torch.ones(64, 64) for x in "AB"}
    save_file(pair, tmp_path / "lora.safetensors")
    given = (tmp_path / "base.safetensors", tmp_path / "out.safetensors", "original")
    done = convert(*given, lora=tmp_path / "lora.safetensors")
    assert "at strength 1, by: alpha = rank, unsaid." in done.words[-3]
    assert "lora.safetensors does not say how strong its products are" in done.words[-2]


def test_heads_are_128_wide_unless_said(tmp_path):
    wide = WanConfig(dim=256, ffn_dim=64, layers=1, heads=2, text_dim=8)
    save_file(weights(config=wide), tmp_path / "w.safetensors")
    for heads, width, expected in ((None, 128, 2), (8, 32, 8)):
        out = tmp_path / f"d{heads}"
        convert(tmp_path / "w.safetensors", out, "diffusers", heads=heads)
        config = json.loads((out / "config.json").read_text())
        assert (config["num_attention_heads"], config["attention_head_dim"]) == (expected, width)


@pytest.mark.parametrize("to", ["original", "diffusers"])
def test_what_is_there_is_replaced_only_by_force(tmp_path, to):
    source, out = tmp_path / "w.safetensors", tmp_path / "out"
    out = out.with_suffix(".safetensors") if to == "original" else out
    save_file(weights(), source)
    convert(source, out, to, heads=2)
    changed = {k: v * 2 for k, v in weights().items()}
    save_file(changed, source)
    with pytest.raises(ValueError, match="already there"):
        convert(source, out, to, heads=2)
    assert same(read_checkpoint(out).tensors, weights())
    convert(source, out, to, heads=2, force=True)
    assert same(read_checkpoint(out).tensors, changed)


def test_a_checkpoint_can_be_written_over_itself(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(weights(), path)
    convert(path, path, "original", force=True)
    assert same(read_checkpoint(path).tensors, weights())
    convert(path, tmp_path / "d", "diffusers", heads=2)
    convert(tmp_path / "d", tmp_path / "d", "diffusers", heads=2, force=True)
    assert same(read_checkpoint(tmp_path / "d").tensors, weights())


def test_the_target_is_checked_before_the_source_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        convert(tmp_path / "not there.pt", tmp_path / "x.pt", "original")
    with pytest.raises(ValueError, match="No file or folder"):
        convert(tmp_path / "not there.pt", tmp_path / "x.safetensors", "original")
    assert not list(tmp_path.iterdir())
