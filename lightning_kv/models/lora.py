"""LoRA adapters merged into the weights at load, so that no code runs for them afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lightning_kv.models.names import describe, some, to_diffusers

PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
ALPHA = re.compile(r"(?P<module>.+)\.alpha")


def merge_lora(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add ``(alpha / rank) * B @ A`` to each adapted weight (LoRA, arXiv 2106.09685).

    The sum is made in float32 and cast back to the weight's dtype; ``alpha`` is the rank where
    the adapter does not hold it, as LongLive's does not. The given tensors stay as they are.

    Args:
        weights: Under original names.
        adapter: Under PEFT names without wrappings: ``MODULE.lora_A[.ADAPTER].weight`` and
            ``lora_B``, optionally ``MODULE.alpha``; modules under original or diffusers names.

    Raises:
        ValueError: A name of another kind, half a pair, a module that is not there, or a shape
            that does not fit.
    """
    pairs, alphas = _pairs(adapter)
    names = {to_diffusers(key): key for key in weights} | {key: key for key in weights}
    merged = dict(weights)
    for module, pair in pairs.items():
        key = names.get(f"{module}.weight")
        if key is None:
            raise ValueError(
                f"The LoRA adapts {module!r}, which these weights do not have. "
                "Give the weights it was trained on."
            )
        down, up, weight = pair["A"].float(), pair["B"].float(), weights[key]
        if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"The LoRA of {module!r} does not fit: A is {list(pair['A'].shape)} and B is "
                f"{list(pair['B'].shape)} for a weight of {list(weight.shape)}. "
                "It was trained for a network of another size: give the weights it belongs to."
            )
        scale = float(alphas[module]) / len(down) if module in alphas else 1.0
        merged[key] = (weight.float() + scale * (up @ down)).to(weight.dtype)
    return merged


def _pairs(
    adapter: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Matrices by module and side, and the alphas by module."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas, adapters, foreign = {}, set(), []
    for key, tensor in adapter.items():
        if (found := PAIR.fullmatch(key)) and tensor.ndim == 2:
            pairs.setdefault(found["module"], {})[found["side"]] = tensor
            adapters.add(found["adapter"])
        elif (found := ALPHA.fullmatch(key)) and tensor.numel() == 1:
            alphas[found["module"]] = tensor
        else:
            foreign.append(key)
    if foreign or not pairs:
        raise ValueError(
            f"This is no LoRA of plain pairs, but {describe(foreign)}. "
            "Give a file of matrices *.lora_A.weight and *.lora_B.weight, as PEFT writes them."
        )
    if len(adapters) > 1:
        names = ", ".join(sorted(map(str, adapters)))
        raise ValueError(
            f"The LoRA file holds several adapters: {names}. Give a file with one of them."
        )
    half = [module for module, sides in pairs.items() if len(sides) == 1]
    half += [f"{module} (alpha only)" for module in alphas.keys() - pairs.keys()]
    if half:
        raise ValueError(
            f"The LoRA has only one of A and B for {some(half, 6)}. "
            "It may be cut off: copy it again."
        )
    return pairs, alphas
