"""From what people write for a model to a model that can roll out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_kv.models.checkpoints import Checkpoint, load_into, read_checkpoint
from lightning_kv.models.embedded import load_embedded
from lightning_kv.models.embeddings import INDEX, PromptBook
from lightning_kv.models.precision import known_profile
from lightning_kv.models.sizes import parameters
from lightning_kv.models.sources import Source, find_model
from lightning_kv.models.text import WanText, text_fingerprint
from lightning_kv.models.vae import WanVAE
from lightning_kv.models.video import Encoder, VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.utilities.formatting import format_bytes

LARGE = 5e9  # parameters that no CPU should be asked to run
ROOM = 1.15  # memory that weights need, times this: the rest of a rollout is on top


def load_model(
    name: str = "panorama",
    device: str | torch.device = "cpu",
    precision: str | None = None,
    text: Path | Encoder | None = None,
    vae: Path | None = None,
    decode: bool = True,
    prompts: Sequence[str] | None = None,
) -> VideoModel:
    """A model by name or file; see :func:`lightning_kv.models.sources.find_model`.

    Args:
        name: ``panorama``, a published checkpoint (``self-forcing``), ``NAME=FILE``, a weights
            file, or a YAML file.
        device: Where to put it.
        precision: A profile of :data:`lightning_kv.models.precision.PROFILES`; ``float32`` for the
            embedded model and ``reference`` for Wan where not given.
        text: Folder of embeddings, or of tokenizer and text encoder, or another encoder.
        vae: Folder of the VAE.
        decode: Load a VAE; a model without one gives latents only.
        prompts: All that will be asked for. A text encoder then encodes them now and is let go,
            which leaves its 11 GB to the rollout.

    Raises:
        ValueError: Unknown name, weights that are missing, damaged or of another model, too little
            memory, or no text encoder or VAE; all of it before anything large is read, except
            what only the weights themselves can show.
    """
    source = find_model(name)
    if source.config is None:
        if text is not None or vae is not None:
            raise ValueError(
                f"{name!r} has a text encoder and a codec of its own, and text={text!r}, "
                f"vae={vae!r} were given. Leave both out: they are for Wan models."
            )
        return replace(load_embedded(source.weights, device, precision or "float32"), name=name)
    precision = precision or "reference"
    check_memory(source.config, precision, device)
    text = text or source.text
    check_places(name, source, text)
    codec = vae_source(vae or source.vae, device, precision) if decode else None
    if codec is not None and codec.stride != source.config.stride:
        raise ValueError(
            f"The VAE {vae or source.vae} makes {codec.stride} pixel frames and pixels of a latent "
            f"frame and side, and {name!r} is for {source.config.stride}. Give the VAE of Wan2.1."
        )
    encoder = text if callable(text) else book_of(text, device, prompts)
    checkpoint = read_checkpoint(source.weights, source.key, source.lora, source.prefer)
    for note in checkpoint.strength.notes if checkpoint.strength else ():
        warnings.warn(note, stacklevel=2)
    network = network_of(source, checkpoint)
    encoder = encoder or text_source(text, device, prompts)
    network = network.cast(precision).eval().requires_grad_(False).to(device)
    told = {"text": getattr(encoder, "fingerprint", None), "vae": codec and codec.fingerprint}
    told = {what: mark for what, mark in told.items() if mark}
    return VideoModel(network, codec, encoder, identity(checkpoint, precision) | told, name)


def check_places(name: str, source: Source, text: Path | Encoder | None) -> None:
    """Say what is not there, before anything large is read.

    Raises:
        ValueError: There are no weights, no LoRA, or no text states where they should be.
    """
    for path in (source.weights, source.lora):
        if path is not None and not path.exists():
            raise ValueError(f"There is no {path}, which {name!r} names. Give one that is there.")
    if text is None:
        raise ValueError(
            "This model needs text states, and neither a text encoder nor embeddings are here. "
            "Type `lightning-kv fetch wan2.1-parts`, or give --text FOLDER: one that "
            "`lightning-kv encode` wrote, or one with tokenizer/ and text_encoder/."
        )
    if not callable(text) and not (Path(text) / INDEX).is_file():
        text_fingerprint(text)


def network_of(source: Source, checkpoint: Checkpoint) -> CausalWan:
    """A network with a checkpoint's own weights; nothing is copied yet."""
    with torch.device("meta"):
        network = CausalWan(source.config)
    load_into(network, checkpoint)
    return network


def identity(checkpoint: Checkpoint, precision: str) -> dict[str, str]:
    """What a result says about the weights it comes from."""
    strength = checkpoint.strength
    found = {
        "weights": checkpoint.sha256,
        "key": checkpoint.key,
        "format": checkpoint.format,
        "lora": checkpoint.lora,
        "lora_weights": checkpoint.lora_sha256,
        "lora_strength": strength and str(strength),
        "lora_strength_by": strength and strength.origin,
        "lora_config": strength and strength.config_sha256,
        "precision": precision,
    }
    return {name: value for name, value in found.items() if value is not None}


class Encoded(nn.Module):
    """Text states of a few prompts, held in memory.

    Args:
        encoder: Makes them.
        prompts: The prompts, and nothing else is known.
    """

    def __init__(self, encoder: WanText, prompts: Sequence[str]) -> None:
        super().__init__()
        self.fingerprint = encoder.fingerprint
        self.rows = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        states = torch.cat([encoder([prompt]) for prompt in self.rows])
        self.register_buffer("states", states, persistent=False)

    def forward(self, prompts: list[str]) -> Tensor:
        """Text states ``[B, length, width]``.

        Raises:
            ValueError: A prompt that was not named.
        """
        unknown = [prompt for prompt in prompts if prompt not in self.rows]
        if unknown:
            raise ValueError(
                f"The text encoder was let go before it met {unknown[0]!r}. "
                "Name every prompt in load_model(prompts=...), or leave prompts out."
            )
        return self.states[[self.rows[prompt] for prompt in prompts]]


def book_of(
    folder: Path, device: str | torch.device, prompts: Sequence[str] | None
) -> PromptBook | None:
    """Embeddings that were computed before; None where a folder holds a text encoder.

    Raises:
        ValueError: A prompt has no embedding.
    """
    if not (Path(folder) / INDEX).is_file():
        return None
    book = PromptBook(folder, device)
    book.require(prompts or ())
    return book


def text_source(
    folder: Path, device: str | torch.device, prompts: Sequence[str] | None = None
) -> Encoder:
    """The text encoder, or what it makes of prompts.

    Raises:
        ValueError: There is none.
    """
    encoder = WanText.load(folder, device)
    return encoder if prompts is None else Encoded(encoder, prompts)


def vae_source(folder: Path | None, device: str | torch.device, precision: str) -> WanVAE:
    """The VAE, in the precision of the rollout.

    Raises:
        ValueError: There is none.
    """
    if folder is None:
        raise ValueError(
            "Pixels need a VAE, and none is here. Type `lightning-kv fetch wan2.1-parts`, give "
            "--vae FOLDER (the vae/ folder of a Wan2.1 repository in diffusers format), or ask for "
            "latents only."
        )
    return WanVAE.load(folder, device, known_profile(precision).dtype)


def check_memory(config: WanConfig, precision: str, device: str | torch.device) -> None:
    """Refuse weights that do not fit into the memory of a device, before reading them.

    Raises:
        ValueError: Says what is needed and what is there.
    """
    size = torch.finfo(known_profile(precision).dtype).bits // 8
    count, device = parameters(config), torch.device(device)
    needed, there = count * size * ROOM, memory_of(device)
    if count > LARGE and device.type == "cpu" and needed <= there:
        raise ValueError(
            f"A network of {count / 1e9:.1f} billion parameters on a CPU takes hours for a second "
            "of video. Use a GPU with 40 GiB or more, or a model of 1.3 billion."
        )
    if needed > there:
        raise ValueError(
            f"The weights alone take {format_bytes(needed)} in {precision}, and {device} has "
            f"{format_bytes(there)}. Use a GPU with more memory, or a smaller model."
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
