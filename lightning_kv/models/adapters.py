"""LoRA files: where the matrices and what is said of them lie in a file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_kv.models.containers import Source, is_flat, open_source
from lightning_kv.models.lora import Merged, merge_lora
from lightning_kv.models.names import some
from lightning_kv.models.strength import read_settings

KEYS = ("generator_lora", "state_dict")
"""Where matrices lie in a torch file, the preferred first."""

NAMES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
"""What PEFT and diffusers call a LoRA in its folder."""


def open_adapter(path: Path) -> Source:
    """Open a LoRA: a file, or a folder with one under a name that PEFT or diffusers gives it.

    Raises:
        ValueError: As :func:`~lightning_kv.models.containers.open_source`.
    """
    inside = (path / name for name in NAMES if (path / name).is_file())
    return open_source(next(inside, path))


def merge_adapter(weights: Mapping[str, Tensor], adapter: Source) -> Merged:
    """Weights with a LoRA in them, as strong as its writer says.

    Args:
        weights: Under original names.
        adapter: As :func:`open_adapter` opens it.

    Raises:
        ValueError: It holds no matrices, or as
            :func:`~lightning_kv.models.strength.read_settings` and
            :func:`~lightning_kv.models.lora.merge_lora`.
    """
    matrices = _matrices(adapter)
    settings = read_settings(adapter.files[0], adapter.header, matrices)
    return merge_lora(weights, matrices, settings, str(adapter.path))


def _matrices(adapter: Source) -> dict[str, Tensor]:
    """The tensors of a LoRA."""
    content = adapter.content
    held = [content.get(key) for key in KEYS] if isinstance(content, dict) else []
    if found := next((table for table in (content, *held) if is_flat(table)), None):
        return found
    entries = some([str(name) for name in content], 6) if held else f"a {type(content).__name__}"
    raise ValueError(
        f"The LoRA {adapter.path} holds no table of matrices, but {entries}. Give a file with the "
        f"matrices alone, or under {' or '.join(KEYS)}."
    )
