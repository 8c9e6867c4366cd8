"""Text states of Wan models: prompt cleaning, tokenizer and UMT5 encoder."""

from __future__ import annotations

import hashlib
import html
import importlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_kv.models.embeddings import padded

LENGTH = 512  # tokens: what the published models were trained with
CLEANING = 1  # raise it when `clean` changes
PROBES, PROBE = 64, 4096  # places per weights file that the fingerprint reads, and bytes at each


def wan_extra(module: str) -> ModuleType:
    """Import a package of the optional extra.

    Args:
        module: Its import name.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"The package {module!r} cannot be imported: {error}. Wan models need it: "
            'pip install "lightning_kv[wan]"'
        ) from error


def clean(text: str) -> str:
    """Clean a prompt as the published models do: repaired encoding, no entities, single blanks.

    Args:
        text: The prompt as written.

    Raises:
        ValueError: ftfy is not installed.
    """
    text = html.unescape(html.unescape(wan_extra("ftfy").fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class WanText(nn.Module):
    """Prompts to text states, with the tokenizer and the encoder of a Wan repository.

    Args:
        tokenizer: A transformers tokenizer.
        encoder: A transformers text encoder.
        length: Tokens that every prompt is padded or cut to, the end token included.
        fingerprint: Identity of tokenizer and weights, see `text_fingerprint`.
    """

    def __init__(
        self, tokenizer: Any, encoder: nn.Module, length: int = LENGTH, fingerprint: str = ""
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.length = tokenizer, encoder, length
        self._fingerprint = fingerprint

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> WanText:
        """Load from local files; nothing is downloaded.

        Args:
            folder: Holds ``tokenizer/`` and ``text_encoder/``, as the diffusers repositories do.
            device: Where to put the encoder.
            dtype: Of the weights (16 bit: 11.4 GB for the published encoder).

        Raises:
            ValueError: transformers is not installed, or files are missing or damaged.
        """
        fingerprint = text_fingerprint(folder, dtype)
        transformers = wan_extra("transformers")
        transformers.utils.logging.disable_progress_bar()
        tokenizer_at, encoder_at = _parts(folder)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                tokenizer_at, local_files_only=True
            )
            encoder, found = transformers.UMT5EncoderModel.from_pretrained(
                encoder_at,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The text encoder in {folder} cannot be loaded: {error}. Copy its tokenizer/ and "
                "text_encoder/ again."
            ) from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"The text encoder in {encoder_at} lacks {len(missing)} tensors, such as "
                f"{missing[0]}. Give the UMT5 encoder of a Wan repository, all its shards."
            )
        encoder.eval().requires_grad_(False)
        return cls(tokenizer, encoder.to(device), fingerprint=fingerprint)

    @property
    def fingerprint(self) -> str:
        """Identity of tokenizer, weights, number format and cleaning.

        Raises:
            ValueError: The parts were not loaded from files.
        """
        if not self._fingerprint:
            raise ValueError(
                "This text encoder has no fingerprint: it was built from parts in memory. "
                "Use WanText.load, or give fingerprint= when building it."
            )
        return self._fingerprint

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to ``[B, length, dim]``, exactly 0 after each prompt's last token.

        A prompt that is cut because it is too long is warned about.
        """
        return padded(self.states(prompts), self.length)

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text states at their true length, ``[tokens, dim]`` per prompt, the end token included.

        The encoder still sees every prompt padded to ``length``, as when the models were trained.
        """
        texts = [clean(prompt) for prompt in prompts]
        self._warn_of_cuts(texts)
        made = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).to(self.encoder.device)
        hidden = self.encoder(made.input_ids, attention_mask=made.attention_mask).last_hidden_state
        return [row[mask.bool()] for row, mask in zip(hidden, made.attention_mask, strict=True)]

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        counts = [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids]
        for text, count in zip(texts, counts, strict=True):
            if count > self.length:
                warnings.warn(
                    f"A prompt of {count} tokens is cut to {self.length}, the most that the model "
                    f"takes: {text[:60]!r}...",
                    stacklevel=2,
                )


def text_fingerprint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """Identity of the text states that a folder gives: 64 hexadecimal digits, found in seconds.

    Made of the tokenizer's files, the encoder's configuration, the number format, the cleaning
    and, per weights file, its name, size, header and samples of its content: reading 11 GB in
    full would take longer than encoding.

    Args:
        folder: Holds ``tokenizer/`` and ``text_encoder/``.
        dtype: Of the weights in use.

    Raises:
        ValueError: The folder lacks something.
    """
    tokenizer, encoder = _parts(folder)
    digest = hashlib.sha256(f"cleaning {CLEANING}, {dtype}\n".encode())
    for path in sorted(p for p in tokenizer.iterdir() if p.is_file() and p.name[0] != "."):
        _add(digest, path.name, path.read_bytes())
    _add(digest, "config.json", (encoder / "config.json").read_bytes())
    for path in sorted(encoder.glob("*.safetensors")):
        _add(digest, path.name, _sampled(path))
    return digest.hexdigest()


def _add(digest: Any, name: str, content: bytes) -> None:
    digest.update(f"{name} {len(content)}\n".encode())
    digest.update(content)


def _sampled(path: Path) -> bytes:
    """Size and header of a safetensors file, and its bytes at evenly spread places."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header = min(int.from_bytes(start, "little"), size)
        parts = [str(size).encode(), start, file.read(header)]
        for probe in range(PROBES):
            file.seek(8 + header + (size - 8 - header) * probe // PROBES)
            parts.append(file.read(PROBE))
    return b"".join(parts)


def _parts(folder: Path) -> tuple[Path, Path]:
    """The folders of tokenizer and encoder, with something in them."""
    tokenizer, encoder = Path(folder) / "tokenizer", Path(folder) / "text_encoder"
    lacking = [
        name
        for name, there in (
            ("tokenizer/", tokenizer.is_dir() and any(tokenizer.iterdir())),
            ("text_encoder/config.json", (encoder / "config.json").is_file()),
            ("text_encoder/*.safetensors", any(encoder.glob("*.safetensors"))),
        )
        if not there
    ]
    if lacking:
        raise ValueError(
            f"There is no Wan text encoder in {folder}: it lacks {', '.join(lacking)}. "
            "Give the folder of a Wan repository in diffusers format, such as "
            "Wan2.1-T2V-1.3B-Diffusers, that holds tokenizer/ and text_encoder/."
        )
    return tokenizer, encoder
