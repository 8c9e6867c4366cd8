"""Checkpoints of causal Wan in and out: torch files, safetensors, diffusers folders, LoRA."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_kv.models.adapters import merge_adapter, open_adapter
from lightning_kv.models.containers import (
    TORCH_SUFFIXES,
    WEIGHTS_NAME,
    Container,
    check_dtype,
    open_source,
)
from lightning_kv.models.names import (
    bare,
    describe,
    one_prefix,
    original_keys,
    some,
    split_block,
    to_diffusers,
    to_original,
    unwrap,
)
from lightning_kv.models.sizes import models
from lightning_kv.models.strength import Strength
from lightning_kv.models.wan import CausalWan

Naming = Literal["original", "diffusers"]

KEYS = ("generator_ema", "generator", "model", "state_dict")
"""Where weights lie in a torch file, the preferred first."""

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they were read, with everything a result has to say about them.

    Args:
        tensors: Under original names, all of them, in the dtype of the file.
        format: Whose names the file used.
        container: How it was stored.
        key: Top-level entry of a torch file that was used; None where there was no choice.
        sha256: Of the file; of several shards, that of the lines ``HASH  NAME`` of ``sha256sum``
            in the order of their names.
        lora: Name of the LoRA that is merged in, a file's or a folder's.
        lora_sha256: Of its file.
        strength: What it was multiplied with, and who said so.
    """

    tensors: dict[str, Tensor]
    format: Naming
    container: Container
    key: str | None
    sha256: str
    lora: str | None = None
    lora_sha256: str | None = None
    strength: Strength | None = None


def read_checkpoint(
    path: str | Path,
    key: str | None = None,
    lora: str | Path | None = None,
    prefer: str | None = None,
) -> Checkpoint:
    """Read the weights of a causal Wan, in any published wrapping, under original names.

    Nothing in a file is ever run. All weights must be there and no others; what cannot be used is
    said before anything large is read.

    Args:
        path: A torch file, a safetensors file, or a folder of safetensors (also a diffusers
            pipeline, whose transformer is taken).
        key: Top-level entry of a torch file, or what the names to take begin with; default: the
            first of ``generator_ema``, ``generator``, ``model``, ``state_dict`` that is there.
        prefer: An entry to try before those.
        lora: A LoRA to merge (:func:`lightning_kv.models.lora.merge_lora`), at the strength that
            its writer gives it: a file, or a folder of PEFT or diffusers.

    Raises:
        ValueError: No such file, a damaged one, one with code in it, another kind of weights,
            a key that is not there, or weights that are missing or too many.
    """
    source = open_source(Path(path))
    adapter = None if lora is None else open_adapter(Path(lora))
    chosen, found = source.choose(key, KEYS if prefer is None else (prefer, *KEYS))
    naming, tensors = _network(source.path, found)
    merged = None if adapter is None else merge_adapter(tensors, adapter)
    return Checkpoint(
        tensors=tensors if merged is None else merged.tensors,
        format=naming,
        container=source.container,
        key=chosen,
        sha256=source.sha256(),
        lora=None if lora is None else Path(lora).absolute().name,
        lora_sha256=None if adapter is None else adapter.sha256(),
        strength=None if merged is None else merged.strength,
    )


def _network(path: Path, found: Mapping[str, Tensor]) -> tuple[Naming, dict[str, Tensor]]:
    """All weights of a network under original names, and whose names they had."""
    choice = "Choose one with --key PREFIX, or `key: PREFIX` in a model file."
    prefix = one_prefix(found, f"{path} holds Wan weights", choice)
    named = _unwrapped(path, found, prefix)
    naming = _naming(path, named)
    if others := [name for name in found if not unwrap(name).startswith(prefix)]:
        own = prefix.rstrip(".")
        raise ValueError(
            f"{path} holds {len(found) - len(others)} tensors under {own} and {len(others)} "
            f"others: {some(others, 3)}. Choose the former with --key {own}, or `key: {own}` in a "
            "model file."
        )
    translate = to_original if naming == "diffusers" else _original
    tensors = {translate(name): tensor for name, tensor in named.items()}
    _check_complete(str(path), tensors)
    return naming, tensors


def _unwrapped(path: Path, found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors under the names that were there before training and programs wrapped the network."""
    names: dict[str, str] = {}
    for name, tensor in found.items():
        own = bare(name, prefix)
        if own in names:
            raise ValueError(
                f"{path} holds {names[own]!r} and {name!r}, both of which are {own!r} without "
                "the wrappings of training. Give a file with one set of weights."
            )
        check_dtype(str(path), name, tensor)
        names[own] = name
    return {own: found[name] for own, name in names.items()}


def _naming(path: Path, names: Iterable[str]) -> Naming:
    """Whose names these are."""
    tops = {name.partition(".")[0] for name in names}
    if ("condition_embedder" in tops) == ("text_embedding" in tops):
        raise ValueError(
            f"{path} holds no weights of a Wan transformer; it looks like {describe(names)}. "
            "Give a checkpoint with the names of the original (text_embedding.*) or of diffusers "
            "(condition_embedder.*)."
        )
    return "diffusers" if "condition_embedder" in tops else "original"


def _original(name: str) -> str:
    """The same name, if it is an original one."""
    to_diffusers(name)
    return name


def _check_complete(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Say which weights of the blocks that are there are not."""
    layers = 1 + max((split_block(name)[0] or 0 for name in tensors), default=0)
    needed = list(original_keys(layers))
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(
            f"{what} has {len(needed) - len(missing)} of the {len(needed)} weights of a Wan with "
            f"{layers} layers; missing: {some(missing, 6)}. Give the whole checkpoint."
        )


def load_into(network: CausalWan, checkpoint: Checkpoint) -> None:
    """Put all weights of a checkpoint into a network of the same size.

    A network on the meta device takes the checkpoint's own tensors, in their dtype; any other
    keeps its dtype and device and copies.

    Raises:
        ValueError: Weights are missing, too many, or of another shape.
    """
    theirs, ours = checkpoint.tensors, network.state_dict()
    problems = {
        "missing": [name for name in ours if name not in theirs],
        "unexpected": [name for name in theirs if name not in ours],
        "of another shape": [
            f"{name} {list(theirs[name].shape)} for {list(ours[name].shape)}"
            for name in ours
            if name in theirs and theirs[name].shape != ours[name].shape
        ],
    }
    if any(problems.values()):
        lines = "; ".join(
            f"{len(names)} {words} ({some(names, 6)})" for words, names in problems.items() if names
        )
        raise ValueError(
            f"The weights do not fit the network: {lines}. The weights have {looks_like(theirs)}; "
            f"the network has {looks_like(ours)}. Use the name of the weights' "
            "own size (SIZE=FILE), or a model file with their sizes under `config:`."
        )
    on_meta = any(weight.is_meta for weight in network.parameters())
    network.load_state_dict(theirs, strict=True, assign=on_meta)


def infer_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the network that weights under original names belong to.

    Returns:
        ``dim``, ``ffn_dim``, ``layers``, ``heads`` (Wan's heads are 128 wide; None where ``dim``
        is no multiple of that), ``text_dim``, ``channels``, ``patch``, ``freq_dim``: arguments
        of :class:`~lightning_kv.models.wan.WanConfig`.

    Raises:
        ValueError: These are no weights of a Wan transformer.
    """
    try:
        dim, channels, *patch = tensors["patch_embedding.weight"].shape
        return {
            "dim": dim,
            "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
            "layers": 1 + max(split_block(name)[0] or 0 for name in tensors),
            "heads": None if dim % 128 else dim // 128,
            "text_dim": tensors["text_embedding.0.weight"].shape[1],
            "channels": channels,
            "patch": tuple(patch),
            "freq_dim": tensors["time_embedding.0.weight"].shape[1],
        }
    except KeyError as error:
        raise ValueError(
            f"No sizes can be read off without {error}: this looks like {describe(tensors)}. "
            "Give the weights of a Wan transformer under original names."
        ) from error


def looks_like(tensors: Mapping[str, Tensor]) -> str:
    """Sizes of weights under original names in words, with the preset they belong to."""
    try:
        sizes = infer_sizes(tensors)
    except ValueError:
        return describe(tensors)
    words = "dim {dim}, {layers} layers, ffn {ffn_dim}".format(**sizes)
    if sizes["heads"] is not None:
        words += f", {sizes['heads']} heads of 128"
    for name, config in models().items():
        if all(sizes[part] == getattr(config, part) for part in ("dim", "layers", "ffn_dim")):
            words += f": the size of {name}"
    return words


def save_checkpoint(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    naming: Naming,
    metadata: Mapping[str, str] | None = None,
    heads: int | None = None,
) -> None:
    """Write weights for other programs; nothing is left half-written after an error.

    ``original`` is one safetensors file whose names begin with ``model.``, as in all published
    files of the family, so the original ``generator.load_state_dict`` takes it as it is.
    ``diffusers`` is a folder for ``WanTransformer3DModel.from_pretrained``.

    Args:
        tensors: All weights of a network, under original names.
        path: A ``.safetensors`` file, or the folder; what is there is replaced.
        naming: Whose names to write.
        metadata: Words for the file's header.
        heads: Number of heads, for diffusers' configuration; default: ``dim / 128``.

    Raises:
        ValueError: Weights are missing or unknown, the number of heads cannot be known, or the
            folder holds other files.
    """
    path = Path(path)
    check_target(path, naming)
    _check_complete("What is to be written", {_original(k): v for k, v in tensors.items()})
    config = None if naming == "original" else _diffusers_config(tensors, heads)
    rename = to_diffusers if naming == "diffusers" else "model.{}".format
    named = {rename(name): _own(tensor) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        new = Path(work) / "new"
        _write(named, new, {"format": "pt", **(metadata or {})}, config)
        if path.is_dir():
            os.replace(path, Path(work) / "old")
        os.replace(new, path)


def _write(
    named: dict[str, Tensor], path: Path, header: dict[str, str], config: dict[str, Any] | None
) -> None:
    """One file, or with a configuration a folder of both."""
    if config is None:
        save_file(named, path, header)
        return
    path.mkdir()
    (path / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    save_file(named, path / WEIGHTS_NAME, header)


def check_target(path: Path, naming: Naming) -> None:
    """Say whether weights can be written to a path, before any work.

    Raises:
        ValueError: Not the kind of path that this naming is written to.
    """
    if naming not in get_args(Naming):
        raise ValueError(f"No naming {naming!r}. Known: original, diffusers.")
    if naming == "original":
        if path.suffix != ".safetensors" or path.is_dir():
            raise ValueError(
                f"{path} is no file name for weights under original names. "
                "Give one that ends in .safetensors."
            )
        return
    if path.suffix in (".safetensors", *TORCH_SUFFIXES) or path.is_file():
        raise ValueError(f"{path} is a file; diffusers weights are a folder. Give a folder name.")
    other = {file.name for file in path.iterdir()} if path.exists() else set()
    if other := other - {WEIGHTS_NAME, CONFIG_NAME}:
        raise ValueError(
            f"The folder {path} holds other files: {some(sorted(other), 3)}. "
            "Give a new folder: this one would be replaced as a whole."
        )


def _diffusers_config(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The content of ``config.json`` for ``WanTransformer3DModel``."""
    sizes = infer_sizes(tensors)
    dim, patch = sizes["dim"], sizes["patch"]
    heads = sizes["heads"] if heads is None else heads
    if heads is None or heads < 1 or dim % heads:
        raise ValueError(
            f"The weights are {dim} wide and the number of heads is {heads or 'unknown'}. "
            f"Give heads, a divisor of {dim} (Wan's heads are 128 wide)."
        )
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": sizes["channels"],
        "out_channels": len(tensors["head.head.weight"]) // math.prod(patch),
        "text_dim": sizes["text_dim"],
        "freq_dim": sizes["freq_dim"],
        "ffn_dim": sizes["ffn_dim"],
        "num_layers": sizes["layers"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }


def _own(tensor: Tensor) -> Tensor:
    """A contiguous tensor that shares no memory, as safetensors wants it."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
