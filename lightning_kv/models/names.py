"""Parameter names of causal Wan: original, diffusers, and the wrappings they are published in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lightning_kv.utilities.nearest import hint

WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
"""Name parts that FSDP, activation checkpointing and ``torch.compile`` put in anywhere."""

IMAGE = re.compile(
    r"(^|\.)(img_emb|image_embedder|[kv]_img|norm_k_img|add_[kv]_proj|norm_added_[kq])\."
)
"""Names that only image-to-video checkpoints have."""

KINDS = (
    (r"(^|[._])lora([._]|$)", "a LoRA (give it as lora, beside the weights)"),
    (r"^(network|codec)\.", "the weights of an embedded model"),
    (r"(^|\.)(optimizer\w*|param_groups|exp_avg\w*)(\.|$)", "an optimizer state"),
    (r"^(encoder\.block|shared|token_embedding|blocks\.\d+\.attn)\.", "a text encoder"),
    (r"^(encoder|decoder|quant_conv|post_quant_conv|conv1)\.", "a VAE"),
    (r"^blocks\.\d+\.(self_attn|attn1)\.", "a part of a Wan transformer (one shard?)"),
)
"""Files that are handed in by mistake: a name in them, and what they are."""


def _linears(*pairs: tuple[str, str]) -> dict[str, str]:
    """Names of weight and bias of modules, original to diffusers."""
    return {
        f"{ours}.{leaf}": f"{theirs}.{leaf}"
        for ours, theirs in pairs
        for leaf in ("weight", "bias")
    }


def _attention(ours: str, theirs: str) -> dict[str, str]:
    names = _linears(*((f"{ours}.{x}", f"{theirs}.to_{x}") for x in "qkv"))
    names |= _linears((f"{ours}.o", f"{theirs}.to_out.0"))
    return names | {f"{ours}.norm_{x}.weight": f"{theirs}.norm_{x}.weight" for x in "qk"}


TOP = _linears(
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
) | {"head.modulation": "scale_shift_table"}

# The norm before cross-attention is norm3 in the original and norm2 in diffusers.
BLOCK = (
    _attention("self_attn", "attn1")
    | _attention("cross_attn", "attn2")
    | _linears(("norm3", "norm2"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"))
    | {"modulation": "scale_shift_table"}
)

# Of both namings; a LoRA of a parameter that is no module's weight has ".weight" behind it.
_TOP, _BLOCK = (
    {name.removesuffix(".weight") for pair in names.items() for name in pair}
    for names in (TOP, BLOCK)
)


def to_diffusers(key: str) -> str:
    """The diffusers name of an original name.

    >>> to_diffusers("blocks.7.norm3.bias")
    'blocks.7.norm2.bias'

    Raises:
        ValueError: No original name of text-to-video Wan.
    """
    return _translate(key, TOP, BLOCK, "original")


def to_original(key: str) -> str:
    """The original name of a diffusers name.

    >>> to_original("blocks.7.attn1.to_out.0.weight")
    'blocks.7.self_attn.o.weight'

    Raises:
        ValueError: No diffusers name of text-to-video Wan.
    """
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, BLOCK))
    return _translate(key, top, block, "diffusers")


def _translate(key: str, top: dict[str, str], block: dict[str, str], naming: str) -> str:
    index, inner = split_block(key)
    names = top if index is None else block
    if inner in names:
        return names[inner] if index is None else f"blocks.{index}.{names[inner]}"
    if IMAGE.search(key):
        raise ValueError(
            f"{key!r} belongs to an image-to-video checkpoint, which also reads image features. "
            "Give a text-to-video checkpoint."
        )
    whole = names if index is None else [f"blocks.{index}.{name}" for name in names]
    near = hint(inner, names, dict(zip(names, whole, strict=True)))
    raise ValueError(
        f"{key!r} is no {naming} name of a Wan weight.{near} Known: {', '.join(whole)}."
    )


def split_block(key: str) -> tuple[int | None, str]:
    """Number of the block and name inside it; no number for names outside the blocks.

    >>> split_block("blocks.12.ffn.0.bias")
    (12, 'ffn.0.bias')
    """
    found = re.fullmatch(r"blocks\.(0|[1-9]\d*)\.(.+)", key)
    return (int(found[1]), found[2]) if found else (None, key)


def original_keys(layers: int) -> Iterator[str]:
    """All original names of a network with this many blocks."""
    yield from TOP
    for index in range(layers):
        yield from (f"blocks.{index}.{inner}" for inner in BLOCK)


def unwrapped_parts(key: str) -> list[str]:
    """The parts of a name without those that wrappers put in anywhere."""
    return [part for part in key.split(".") if part not in WRAPPERS]


def unwrap(key: str) -> str:
    """Take off what training wrappers put around a name, however often.

    >>> unwrap("model._fsdp_wrapped_module.blocks.0._orig_mod.ffn.0.weight")
    'blocks.0.ffn.0.weight'
    """
    parts = unwrapped_parts(key)
    while parts[:1] in (["module"], ["model"]) or parts[:2] == ["base_model", "model"]:
        del parts[: 2 if parts[0] == "base_model" else 1]
    return ".".join(parts) or key


def bare(key: str, prefix: str) -> str:
    """A name without wrappings, and without a prefix where it has it.

    >>> bare("model.diffusion_model.head.head.bias", "diffusion_model.")
    'head.head.bias'
    """
    return unwrap(key).removeprefix(prefix)


def one_prefix(keys: Iterable[str], what: str, choice: str) -> str:
    """What stands before the names of Wan weights once they are unwrapped; mostly nothing.

    Programs put their own name for the network there, such as ``diffusion_model.`` or
    ``transformer.``; checkpoints of a training, the path to it (``generator.model.``).

    Args:
        keys: Names of weights; those of anything else do not count.
        what: Who has them, with a verb, for the error.
        choice: How to choose one prefix.

    Raises:
        ValueError: There are several.
    """
    found = Counter(prefix for key in keys if (prefix := _before(unwrap(key))) is not None)
    if len(found) > 1 and "" not in found:
        listed = (f"{prefix.rstrip('.')} ({count})" for prefix, count in sorted(found.items()))
        raise ValueError(f"{what} under several prefixes: {', '.join(listed)}. {choice}")
    return "" if "" in found else next(iter(found), "")


def _before(key: str) -> str | None:
    """What stands before the longest end of a name that is one of a Wan weight."""
    parts = key.split(".")
    for start in range(len(parts)):
        index, inner = split_block(".".join(parts[start:]))
        if inner.removesuffix(".weight") in (_TOP if index is None else _BLOCK):
            return "".join(f"{part}." for part in parts[:start])
    return None


def describe(keys: Iterable[str], kinds: Sequence[tuple[str, str]] = KINDS) -> str:
    """What names look like that are no Wan transformer's, with a few of them.

    Args:
        keys: The names.
        kinds: Patterns, and what it is if one of the names has it.
    """
    keys = list(keys)
    if not keys:
        return "nothing"
    words = next(
        (words for pattern, words in kinds if any(re.search(pattern, key) for key in keys)),
        "something unknown",
    )
    return f"{words}: {some(keys, 3)}"


def some(names: list[str], most: int) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
