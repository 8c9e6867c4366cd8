"""What people write for a model, and where its weights then are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lightning_kv.models.catalogue import CATALOGUE, Published, by_file_name, parts_folder
from lightning_kv.models.embedded import WEIGHTS, shipped
from lightning_kv.models.samplers import spaced
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.utilities.nearest import unknown

FILE_KEYS = ("name", "like", "weights", "lora", "key", "text", "vae", "config")  # 3 are needed


@dataclass(frozen=True)
class Source:
    """Where a model's weights are, and how it is sampled.

    Args:
        name: What results call it.
        weights: A file, or a folder of shards.
        config: Sizes and conventions; None for a file of the embedded model, which says them.
        key: Top-level entry of a torch file; the usual ones are tried where None.
        prefer: Entry to try before the usual ones.
        lora: A LoRA to merge.
        text: Folder with embeddings, or with tokenizer and text encoder; None where there is none.
        vae: Folder of the VAE; None where there is none.
        policy: The cache policy that its authors run.
    """

    name: str
    weights: Path
    config: WanConfig | None = None
    key: str | None = None
    lora: Path | None = None
    text: Path | None = None
    vae: Path | None = None
    policy: str = "full"
    prefer: str | None = None


def find_model(text: str) -> Source:
    """Where the weights of a model are, without reading them.

    Args:
        text: ``panorama``; a file that ``pretrain`` wrote; a published checkpoint (``longlive``),
            also with its file (``longlive=base.pt+lora.pt``); the file of one, by its own name; or
            a YAML file that says ``weights``, what they are ``like`` and what differs.

    Raises:
        ValueError: No such model, or its weights are not here.
    """
    if text in shipped():
        return Source(text, WEIGHTS / f"{text}.safetensors")
    if text.endswith((".yaml", ".yml")):
        return _from_file(Path(text))
    path = Path(text).expanduser()
    if "=" in text and not path.exists():
        name, _, paths = text.partition("=")
        return _published(name, text, *_files(text, paths))
    if text in CATALOGUE or text in PRESETS:
        return _published(text, text)
    if _is_embedded(path):
        return Source(text, path)
    if (entry := by_file_name(path)) and path.exists():
        return _published(entry.name, text, path)
    if path.exists():
        raise ValueError(
            f"{text} does not say how it is sampled: its name is none of a published checkpoint. "
            f"Write NAME=FILE, such as self-forcing={text} (names: {', '.join(CATALOGUE)})."
        )
    raise ValueError(
        f"{unknown('model', text, [*shipped(), *CATALOGUE])} Or give a weights file, or a YAML "
        "file with `weights:` and `like:`."
    )


def _files(text: str, paths: str) -> tuple[Path, Path | None]:
    """Weights and LoRA of ``WEIGHTS+LORA``; a file whose own name has a plus is one."""
    whole = Path(paths).expanduser()
    if not paths:
        raise ValueError(f"{text!r} names no file. Write NAME=FILE, or NAME=WEIGHTS+LORA.")
    if whole.exists() or "+" not in paths:
        return whole, None
    weights, _, lora = paths.partition("+")
    return Path(weights).expanduser(), Path(lora).expanduser()


def _published(
    name: str, text: str, weights: Path | None = None, lora: Path | None = None
) -> Source:
    """A checkpoint of the catalogue, or weights of a preset's size."""
    parts = parts_folder()
    around = {"text": parts, "vae": None if parts is None else parts / "vae"}
    if name in shipped():
        raise ValueError(
            f"{name!r} is in this package, and {text!r} gives it a file. Give {name!r} alone, or a "
            "file that `lightning-kv pretrain` wrote by its path alone."
        )
    if name in PRESETS:
        if weights is None:
            raise ValueError(
                f"{name!r} is a size, without weights. "
                f"Write {name}=FILE, or a published checkpoint: {', '.join(CATALOGUE)}."
            )
        return Source(text, weights, PRESETS[name], None, lora, **around)
    entry = _known(name)
    key = entry.key if weights is None else None  # a file of one's own may be flat
    weights, lora = (weights or entry.path), (lora or (None if weights else entry.lora))
    if weights is None:
        raise ValueError(
            f"The weights of {name!r} are not here. They belong into {entry.folder}: type "
            f"`lightning-kv fetch {name}`, or give your own copy as {name}=FILE."
        )
    if len(entry.files) > 1 and lora is None:
        raise ValueError(
            f"{name!r} is made of weights and a LoRA, and {text!r} gives one file. "
            f"Write {name}=WEIGHTS+LORA (published as {' and '.join(entry.files)}); for weights "
            "that hold both, a YAML file with `lora: null`."
        )
    return Source(
        text,
        weights,
        entry.config,
        key,
        lora,
        **around,
        policy=entry.policy,
        prefer=entry.key,
    )


def _known(name: str) -> Published:
    if name not in CATALOGUE:
        sizes = [size for size in PRESETS if size not in shipped()]
        raise ValueError(
            f"{unknown('published checkpoint', name, CATALOGUE)} Or a size: {', '.join(sizes)}."
        )
    return CATALOGUE[name]


def _is_embedded(path: Path) -> bool:
    """Whether a file is one that ``pretrain`` wrote, or is to be reported as a damaged one."""
    if path.suffix != ".safetensors" or by_file_name(path):
        return False
    try:
        with safe_open(path, "pt") as file:
            return "phrases" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True  # whoever reads it says what is wrong


def _from_file(path: Path) -> Source:
    """A model file: paths in it are relative to it."""
    values = _mapping(path)
    at = {
        key: (path.parent / Path(str(values[key])).expanduser())
        for key in ("weights", "lora", "text", "vae")
        if values.get(key)
    }
    like = str(values["like"])
    base = CATALOGUE[like].config if like in CATALOGUE else PRESETS.get(like)
    if like in CATALOGUE and len(CATALOGUE[like].files) > 1 and "lora" not in values:
        raise ValueError(
            f"{path} says `like: {like}`, which is made of weights and a LoRA, and no `lora:`. "
            "Give the file, or `lora: null` where the weights hold both."
        )
    if base is None:
        raise ValueError(
            f"In {path}, `like` is wrong. {unknown('such model', like, [*CATALOGUE, *PRESETS])}"
        )
    parts = parts_folder()
    vae = at.get("vae", None if parts is None else parts / "vae")
    return Source(
        str(values["name"]),
        at["weights"],
        _changed(path, base, values.get("config") or {}),
        values.get("key"),
        at.get("lora"),
        at.get("text", parts),
        vae,
        CATALOGUE[like].policy if like in CATALOGUE else "full",
        CATALOGUE[like].key if like in CATALOGUE else None,
    )


def _mapping(path: Path) -> dict[str, Any]:
    """What a model file says.

    Raises:
        ValueError: It cannot be read, has an unknown key, or lacks one.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"No model file {str(path)!r}. Give a YAML file, or the name of a model.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no YAML: {error}. A model file has `name:`, `like:` and `weights:`."
        ) from error
    if not isinstance(values, Mapping) or not all(map(values.get, FILE_KEYS[:3])):
        raise ValueError(
            f"{path} is no model file: it has no `name:`, `like:` and `weights:`. "
            "`like` is a published checkpoint or a size whose conventions hold."
        )
    for key in values:
        if key not in FILE_KEYS:
            raise ValueError(f"In {path}: {unknown('key', key, FILE_KEYS)}")
    return dict(values)


def _changed(path: Path, base: WanConfig, changes: Mapping[str, Any]) -> WanConfig:
    known = [field.name for field in fields(WanConfig)]
    if not isinstance(changes, Mapping):
        raise ValueError(
            f"In {path}, `config` is {changes!r}. It maps names to values, such as chunk: 1; "
            f"names: {', '.join(known)}."
        )
    for key in changes:
        if key not in known:
            raise ValueError(f"In the config of {path}: {unknown('setting', key, known)}")
    try:
        made = replace(base, **{name: _plain(name, value) for name, value in changes.items()})
        made.geometry()
        with torch.device("meta"):
            CausalWan(made)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"The config of {path} makes no network: {error}. It was {dict(changes)}, on top of "
            f"{base}."
        ) from error
    return made


def _plain(name: str, value: Any) -> Any:
    """A value as a configuration holds it; ``timesteps: {steps: 50, shift: 5.0}`` are computed."""
    if name == "timesteps" and isinstance(value, Mapping):
        return spaced(**value)
    return tuple(value) if isinstance(value, list) else value
