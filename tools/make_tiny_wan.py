"""A tiny Wan with random weights, in the files of a published one: to try commands without 30 GB.

    python tools/make_tiny_wan.py tiny-wan
    lightning-kv generate "a red fox" --model tiny-wan/model.yaml -o fox.mp4

Writes `generator.pt` (as Self Forcing publishes it), `tokenizer/`, `text_encoder/`, `vae/` (as the
diffusers repository of Wan2.1 has them), `model.yaml`, and prompts in `prompts.txt`. The video is
noise; everything else is as with real weights. Needs the extra: pip install "lightning_kv[wan]".
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import torch
import yaml

from lightning_kv.models.wan import CausalWan, WanConfig

SIZES = {"dim": 64, "ffn_dim": 128, "layers": 2, "heads": 2, "text_dim": 16, "latent_size": [8, 12]}
PROMPTS = ("a red fox runs through snow", "a boat on a lake", "a city at night")


def save_network(folder: Path) -> None:
    """A torch file with EMA weights and raw ones, under the names that training gives them."""
    sizes = SIZES | {"latent_size": tuple(SIZES["latent_size"])}
    raw, average = (CausalWan(WanConfig(**sizes)).state_dict() for _ in range(2))
    torch.save(
        {
            "generator": {f"model.{name}": tensor for name, tensor in raw.items()},
            "generator_ema": {
                f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in average.items()
            },
        },
        folder / "generator.pt",
    )


def save_text(folder: Path) -> None:
    """A tokenizer that knows letters, and a UMT5 of two layers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel, utils

    utils.logging.disable_progress_bar()
    letters = "▁" + string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    made = Tokenizer(models.Unigram([*vocabulary, *((x, -4.0) for x in letters)], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=128, d_model=SIZES["text_dim"], d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    UMT5EncoderModel(config).eval().save_pretrained(folder / "text_encoder")


def save_vae(folder: Path) -> None:
    """A VAE of the published structure, four channels wide."""
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval().save_pretrained(folder / "vae")


def main() -> None:
    """Write everything into one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", default="self-forcing", help="whose sampling (self-forcing)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(chosen.seed)
    save_network(chosen.folder)
    save_text(chosen.folder)
    save_vae(chosen.folder)
    about = {
        "name": "tiny-wan",
        "like": chosen.like,
        "weights": "generator.pt",
        "text": ".",
        "vae": "vae",
        "config": SIZES,
    }
    (chosen.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (chosen.folder / "model.yaml").write_text(yaml.safe_dump(about, sort_keys=False))


if __name__ == "__main__":
    main()
