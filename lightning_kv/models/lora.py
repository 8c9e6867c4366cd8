"""LoRA adapters merged into the weights at load, so that no code runs for them afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_kv.models.containers import check_dtype
from lightning_kv.models.names import (
    IMAGE,
    KINDS,
    bare,
    describe,
    one_prefix,
    some,
    split_block,
    to_diffusers,
    unwrapped_parts,
)
from lightning_kv.models.strength import CONFIG, ELSEWHERE, Settings, Strength, check_alpha

PART = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora[._](?P<side>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
    r"|(?P<single>alpha|diff|diff_b))"
)
"""One tensor of a LoRA: of PEFT and diffusers (A, B), of kohya and ComfyUI (down, up, diff)."""

UNDERSCORED = "lora_unet_"
"""What kohya's trainers put before a module's name, whose dots become underscores."""

FORMATS = (
    (r"lora_magnitude_vector|dora_scale", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.b?oft_", "OFT"),
    (r"\.lora_E|\.ranknum", "AdaLoRA"),
    (r"lora_mid|lora_embedding", "LoRA of convolutions or embeddings in three parts"),
    (r"vera_lambda", "VeRA"),
    (r"ia3_l", "IA3"),
    (r"lora[._](A|B|down|up)\b", "LoRA matrices of an unknown kind or shape"),
    *(kind for kind in KINDS if not re.search("LoRA|shard", kind[1])),
    (r"\.(weight|bias)$", "whole weights (a checkpoint, or PEFT's modules_to_save)"),
)
"""What a file that was given as a LoRA may hold instead, by a name in it."""

CLOSE = 5e-3  # how far a strength may be off when its alpha was stored in bfloat16


@dataclass
class Change:
    """What a LoRA holds for one module.

    Args:
        trained: The module's name in the network that was trained, which patterns are about.
        tensors: By role: ``down``, ``up``, ``up_bias``, ``alpha``, ``diff``, ``diff_b``.
    """

    trained: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """Of the product; None where there is none."""
        return len(self.tensors["down"]) if "down" in self.tensors else None


@dataclass(frozen=True)
class Merged:
    """Weights with a LoRA in them.

    Args:
        tensors: All of them, under original names.
        strength: What the products were multiplied with.
    """

    tensors: dict[str, Tensor]
    strength: Strength


def merge_lora(
    weights: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    settings: Sequence[Settings] = (),
    file: str = "file",
) -> Merged:
    """Add ``scale * B @ A`` to each adapted weight (LoRA, arXiv 2106.09685).

    The scale is the writer's: ``alpha / rank`` by the settings or by ``MODULE.alpha``, and 1 where
    neither says anything, as of LongLive's. Differences (``diff``, ``diff_b``) are added as they
    are. Sums are made in float32 and cast back to the weight's dtype once; the given tensors stay
    as they are.

    Args:
        weights: Under original names.
        adapter: As the file holds it: pairs ``lora_A`` and ``lora_B`` (also with an adapter's
            name, and ``lora_B.bias``) or ``lora_down`` and ``lora_up``, ``alpha``, ``diff``,
            ``diff_b``; modules under original, diffusers or kohya's names, behind wrappings and
            one prefix.
        settings: What is said of its strength elsewhere.
        file: Its name, for errors.

    Raises:
        ValueError: A format of another kind, half a pair, a module that is not there, a shape that
            does not fit, or strengths that are none or contradict each other.
    """
    changes = _placed(read_changes(adapter, file), weights, file)
    said = {m: _said(c, settings, file) for m, c in changes.items() if c.rank is not None}
    scales = {module: next(iter(found.values()), 1.0) for module, found in said.items()}
    tensors = dict(weights)
    for module, change in changes.items():
        deltas = _deltas(module, change, scales.get(module, 1.0), weights, file)
        for key, delta in deltas.items():
            wide = torch.promote_types(tensors[key].dtype, torch.float32)
            tensors[key] = (tensors[key].to(wide) + delta).to(tensors[key].dtype)
    return Merged(tensors, _strength(scales, said, changes, settings, file))


def _strength(
    scales: Mapping[str, float],
    said: Mapping[str, Mapping[str, float]],
    changes: Mapping[str, Change],
    settings: Sequence[Settings],
    file: str,
) -> Strength:
    """The scales, with who said them."""
    unsaid = sum(not found for found in said.values())
    origins = list(dict.fromkeys(origin for found in said.values() for origin in found))
    hashes = (each.sha256 for each in settings if each.origin in origins and each.sha256)
    origins += ["alpha = rank, unsaid"] if unsaid else []
    notes = _notes(changes, unsaid, settings, file)
    return Strength(scales, tuple(origins) or ("differences",), next(hashes, None), notes)


def _notes(
    changes: Mapping[str, Change], unsaid: int, settings: Sequence[Settings], file: str
) -> tuple[str, ...]:
    """What the user should know about strengths that nobody has said, or two have."""
    ranked = [change.trained for change in changes.values() if change.rank is not None]
    notes = []
    if unsaid:
        count = "its" if unsaid == len(ranked) else f"{unsaid} of its {len(ranked)}"
        notes.append(
            f"The LoRA {file} does not say how strong {count} products are: neither {CONFIG} "
            "beside it, nor its header, nor alpha tensors. They are taken as they are "
            "(alpha = rank)."
        )
    for each in settings:
        if doubtful := [module for module in ranked if each.doubtful(module)]:
            notes.append(
                f"{each.where} has several patterns for {some(doubtful, 3)}. The first in the file "
                "counts, as in PEFT; it may not be the first that the LoRA was trained with."
            )
    return tuple(notes)


def read_changes(adapter: Mapping[str, Tensor], file: str = "file") -> dict[str, Change]:
    """What a LoRA holds, by module: without wrappings and prefix, in the file's own naming.

    Raises:
        ValueError: A format of another kind, half a pair, or several adapters or prefixes.
    """
    found = {key: PART.fullmatch(key) for key in adapter}
    foreign = [key for key, part in found.items() if part is None or not _fits(part, adapter[key])]
    if foreign or not found:
        raise ValueError(
            f"The LoRA {file} is no LoRA of plain products, but holds "
            f"{describe(foreign, FORMATS)}. {ELSEWHERE} Read are pairs lora_A and lora_B, "
            "lora_down and lora_up, with alpha, diff and diff_b."
        )
    adapters = {str(part["adapter"]) for part in found.values() if part["side"]}
    if len(adapters) > 1:
        raise ValueError(
            f"The LoRA {file} holds several adapters: {', '.join(sorted(adapters))}. "
            "Give a file with one of them."
        )
    modules = {part["module"] for part in found.values()}
    prefix = one_prefix(
        [f"{module}.weight" for module in modules],
        f"The LoRA {file} changes weights",
        "Give a file with one of them.",
    )
    changes: dict[str, Change] = {}
    for key, part in found.items():
        module = bare(part["module"], prefix)
        change = changes.setdefault(module, Change(_trained(part["module"], module)))
        if (role := _role(part)) in change.tensors:
            raise ValueError(
                f"The LoRA {file} holds {role} of {module!r} twice, once as {key!r}. "
                "Give a file with one LoRA."
            )
        change.tensors[role] = adapter[key]
    _check_whole(changes, file)
    return changes


def _role(part: re.Match[str]) -> str:
    side = {"A": "down", "B": "up"}.get(part["side"], part["side"])
    return part["single"] or (f"{side}_bias" if part["leaf"] == "bias" else side)


def _fits(part: re.Match[str], tensor: Tensor) -> bool:
    """Whether a tensor has the shape that its name says."""
    role = _role(part)
    if role == "alpha":
        return tensor.numel() == 1
    if role in ("down", "up"):
        return tensor.ndim in (2, 4, 5)
    return role != "down_bias"


def _trained(written: str, module: str) -> str:
    """A module's name in the trained network: PEFT puts ``base_model.model.`` before it."""
    parts = unwrapped_parts(written)
    return ".".join(parts[2:]) if parts[:2] == ["base_model", "model"] else module


def _check_whole(changes: Mapping[str, Change], file: str) -> None:
    """Say what is half there, not finite, or in numbers of 8 bits."""
    half = [
        module if {"down", "up"} & set(change.tensors) else f"{module} (alpha or bias only)"
        for module, change in changes.items()
        if len({"down", "up"} & set(change.tensors)) == 1
        or (change.rank is None and {"alpha", "up_bias"} & set(change.tensors))
    ]
    if half:
        raise ValueError(
            f"The LoRA {file} has only one of A and B for {some(half, 6)}. "
            "It may be cut off: copy it again."
        )
    for module, change in changes.items():
        for role, tensor in change.tensors.items():
            if role != "alpha":
                check_dtype(f"The LoRA {file}", f"{role} of {module}", tensor)
                if not tensor.isfinite().all():
                    raise ValueError(
                        f"The LoRA {file} holds values that are not finite in {role} of "
                        f"{module!r}. Its training broke down or the file is damaged: copy it "
                        "again, or give an earlier one."
                    )


def _placed(
    changes: Mapping[str, Change], weights: Mapping[str, Tensor], file: str
) -> dict[str, Change]:
    """Changes by original module name; where modules are parameters, by these."""
    names = {name: key for key in weights for name in (key, to_diffusers(key))}
    places = {name.removesuffix(".weight"): key for name, key in names.items()}
    places |= {UNDERSCORED + name.replace(".", "_"): key for name, key in places.items()}
    if unknown := [module for module in changes if module not in places]:
        raise _nowhere(unknown, weights, file)
    placed: dict[str, Change] = {}
    for module, change in changes.items():
        own = places[module].removesuffix(".weight")
        if own in placed:
            raise ValueError(
                f"The LoRA {file} changes {own!r} under two names, one of them {module!r}. "
                "Give a file with one LoRA."
            )
        placed[own] = change
    return placed


def _nowhere(unknown: Sequence[str], weights: Mapping[str, Tensor], file: str) -> ValueError:
    """The error for modules that the weights do not have, by the reason."""
    layers = 1 + max(split_block(key)[0] or 0 for key in weights)
    deep = [m for m in unknown if (n := re.search(r"blocks[._](\d+)", m)) and int(n[1]) >= layers]
    if deep:
        return ValueError(
            f"The LoRA {file} adapts {deep[0]!r}, and these weights have {layers} layers. "
            "It was trained on a deeper network: give weights of that size."
        )
    if any(IMAGE.search(f"{module}.") for module in unknown):
        return ValueError(
            f"The LoRA {file} adapts {some(unknown, 3)}, which only image-to-video networks have. "
            "Give a LoRA of a text-to-video network."
        )
    return ValueError(
        f"The LoRA {file} adapts {some(unknown, 3)}, which is no part of a Wan transformer. "
        "Modules are read under the names of the original (blocks.0.self_attn.q), of diffusers "
        "(blocks.0.attn1.to_q) and of kohya (lora_unet_blocks_0_self_attn_q): give a LoRA of such "
        "modules alone."
    )


def _said(change: Change, settings: Sequence[Settings], file: str) -> dict[str, float]:
    """The scale by who says it.

    Raises:
        ValueError: They contradict each other.
    """
    rank = len(change.tensors["down"])
    said = {each.origin: each.scale(change.trained, rank) for each in settings}
    if (alpha := change.tensors.get("alpha")) is not None:
        said["alpha tensors"] = check_alpha(float(alpha), change.trained, file) / rank
    found = {origin: scale for origin, scale in said.items() if scale is not None}
    first = next(iter(found.values()), 1.0)
    if not all(math.isclose(first, scale, rel_tol=CLOSE) for scale in found.values()):
        words = ", ".join(f"{scale:g} by its {origin}" for origin, scale in found.items())
        raise ValueError(
            f"The strength of the LoRA {file} is contradictory: {change.trained!r} is scaled by "
            f"{words}. If {CONFIG} belongs to another file, put the LoRA in a folder of its own."
        )
    return found


def _deltas(
    module: str, change: Change, scale: float, weights: Mapping[str, Tensor], file: str
) -> dict[str, Tensor]:
    """What is added to which weight."""
    held, bias = change.tensors, f"{module}.bias"
    own = f"{module}.weight" if f"{module}.weight" in weights else module
    found = []
    if change.rank is not None:
        found.append((own, scale * _product(module, held, weights[own], file)))
    found += [(own, held["diff"].float())] if "diff" in held else []
    for role, factor in (("up_bias", scale), ("diff_b", 1.0)):
        found += [(bias, factor * held[role].float())] if role in held else []
    sums: dict[str, Tensor] = {}
    for key, delta in found:
        if key not in weights or delta.shape != weights[key].shape:
            there = f"is {list(weights[key].shape)}" if key in weights else "does not exist"
            raise ValueError(
                f"The LoRA {file} adds {list(delta.shape)} to {key!r}, which {there} here. It "
                "was trained for another network: give the weights it belongs to."
            )
        sums[key] = sums[key] + delta if key in sums else delta
    return sums


def _product(module: str, held: Mapping[str, Tensor], weight: Tensor, file: str) -> Tensor:
    """``B @ A``; the second matrix of a convolution has a kernel of one point."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    up, down = (held[role].to(wide).flatten(1) for role in ("up", "down"))
    rows = weight.flatten(1)
    if weight.ndim < 2 or up.shape != (len(rows), len(down)) or down.shape[1:] != rows.shape[1:]:
        raise ValueError(
            f"The LoRA {file} does not fit {module!r}: A is {list(held['down'].shape)} and B is "
            f"{list(held['up'].shape)} for a weight of {list(weight.shape)}. "
            "It was trained for a network of another size: give the weights it belongs to."
        )
    return (up @ down).view(weight.shape)
