"""How strongly a LoRA was meant: what its writer says beside the file or in the file's header."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_kv.models.names import some

CONFIG = "adapter_config.json"
"""The file that PEFT writes beside the matrices."""

HEADERS = ("lora_adapter_metadata", "lora_config")
"""Entries of a safetensors header with the same settings: of diffusers, and of finetrainers."""

OTHER_SUMS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "layers that are repeated",
    "modules_to_save": "whole modules that were trained",
    "target_parameters": "LoRA of single parameters",
    "trainable_token_indices": "tokens that were trained",
    "fan_in_fan_out": "matrices of transposed layers",
}
"""Settings under which two matrices and a factor are not all there is to add."""

OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something out of the base weights: the matrices fit only what is left."""

ELSEWHERE = "Merge it with the program that wrote it, and give the merged weights."


@dataclass(frozen=True)
class Settings:
    """What one place says of a LoRA's strength.

    Args:
        origin: In a word, for results: ``adapter_config.json`` or ``header``.
        where: In full, for errors.
        alpha: The numerator of the strength; None where the place does not say it.
        rank: Of the matrices; None where the place does not say it.
        rslora: Divide by the root of the rank (rsLoRA, arXiv 2312.03732), not by the rank.
        alphas: Other numerators, by pattern of module names.
        ranks: Other ranks, by pattern of module names.
        sha256: Of the file that says it, where that is a file of its own.
    """

    origin: str
    where: str
    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None

    def scale(self, module: str, rank: int) -> float | None:
        """The factor of a module's product; None where nothing is said of it.

        Args:
            module: Its name in the network that was trained.
            rank: Of its matrices.

        Raises:
            ValueError: The settings are of matrices of another rank, or incomplete.
        """
        said = matching(self.ranks, module) or ([] if self.rank is None else [self.rank])
        if said and rank not in said:
            raise ValueError(
                f"{self.where} says rank {said[0]} for {module!r}, and its matrices have {rank}. "
                "The two belong to different LoRAs: give the settings that were written with these "
                f"matrices, or the matrices in a folder without {CONFIG}."
            )
        alpha = next(iter(matching(self.alphas, module)), self.alpha)
        if alpha is None and self.rslora:
            raise ValueError(
                f"{self.where} says use_rslora and no lora_alpha for {module!r}, so its strength "
                "is unknown. Add the lora_alpha that it was trained with."
            )
        return None if alpha is None else alpha / (math.sqrt(rank) if self.rslora else rank)

    def doubtful(self, module: str) -> bool:
        """Whether several patterns give a module different strengths.

        The first in the file counts, for PEFT too; but PEFT writes patterns in the order of the
        alphabet, and trains with them in the order in which they were given.
        """
        return len(set(matching(self.alphas, module))) > 1


@dataclass(frozen=True)
class Strength:
    """The factors that a LoRA was merged with, and who said them.

    Args:
        scales: By module, under the names of the weights.
        origins: Where they come from.
        config_sha256: Of the ``adapter_config.json`` that said them.
        notes: What the user should know, in sentences.
    """

    scales: Mapping[str, float]
    origins: tuple[str, ...]
    config_sha256: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One number where all are equal; else the range and a digest that tells two apart."""
        found = sorted(set(self.scales.values())) or [1.0]
        if len(found) == 1:
            return _short(found[0])
        lines = "".join(f"{name} {scale!r}\n" for name, scale in sorted(self.scales.items()))
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        return f"{_short(found[0])} to {_short(found[-1])} ({digest})"

    @property
    def origin(self) -> str:
        """All places that said it."""
        return " and ".join(self.origins)


def _short(number: float) -> str:
    return repr(number).removesuffix(".0")


def matching(patterns: Mapping[str, Any], module: str) -> list[Any]:
    """The values of all patterns that match the end of a module's name, as PEFT reads them.

    A pattern is a regular expression for whole parts of the name, from any dot to the end.

    >>> matching({"ffn.[02]": 1, "blocks.1.*": 2, "fn.0": 3, "^ffn.0": 4}, "blocks.1.ffn.0")
    [1, 2]
    """
    ends = (
        (re.match(rf"(.*\.)?({pattern})$", module), value) for pattern, value in patterns.items()
    )
    return [value for end, value in ends if end]


def read_settings(file: Path, header: Mapping[str, str], names: Iterable[str]) -> list[Settings]:
    """What is said of a LoRA's strength, the file beside it first.

    Args:
        file: The LoRA's own file.
        header: Of that file.
        names: Of its tensors: a header's settings are under the same prefix.

    Raises:
        ValueError: Settings that cannot be read, or whose LoRA is none of plain products.
    """
    found = []
    beside = file.parent / CONFIG
    if beside.exists():
        try:
            content = beside.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{beside} says how strong the LoRA beside it is, and cannot be read: "
                f"{error.strerror}. Make it readable."
            ) from error
        sha256 = hashlib.sha256(content).hexdigest()
        found.append(_settings(_parsed(content, str(beside)), CONFIG, str(beside), sha256))
    if entry := next((entry for entry in HEADERS if entry in header), None):
        where = f"The entry {entry} in the header of {file}"
        values = _under_prefix(_parsed(header[entry], where), names, where)
        found.append(_settings(values, "header", where))
    return found


def _parsed(content: str | bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError(f"it is a {type(values).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{where} is no table of settings: {error}. It has to be JSON with lora_alpha and r, "
            "as PEFT writes it: copy it again."
        ) from error
    return values


def _under_prefix(values: Mapping[str, Any], names: Iterable[str], where: str) -> dict[str, Any]:
    """Settings of the network: pipelines put ``transformer.`` before them, as before tensors."""
    prefixes = {key.rpartition(".")[0] for key in values}
    if len(prefixes) > 1:
        prefixes = {prefix for prefix in prefixes if any(n.startswith(f"{prefix}.") for n in names)}
    if len(prefixes) > 1:
        raise ValueError(
            f"{where} describes several LoRAs: {', '.join(sorted(prefixes))}. "
            "Give a file with one of them."
        )
    prefix = next(iter(prefixes), "")
    return {
        key.rpartition(".")[2]: value
        for key, value in values.items()
        if key.rpartition(".")[0] == prefix
    }


def _settings(
    values: Mapping[str, Any], origin: str, where: str, sha256: str | None = None
) -> Settings:
    """Settings, checked."""
    _refuse_others(values, where)
    alpha, rank = values.get("lora_alpha"), values.get("r")
    rslora = values.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise ValueError(f"{where} gives use_rslora as {rslora!r}. It is true or false.")
    return Settings(
        origin=origin,
        where=where,
        alpha=None if alpha is None else _alpha(alpha, "lora_alpha", where),
        rank=None if rank is None else _rank(rank, "r", where),
        rslora=rslora,
        alphas={
            pattern: _alpha(value, f"alpha_pattern[{pattern!r}]", where)
            for pattern, value in _patterns(values, "alpha_pattern", where)
        },
        ranks={
            pattern: _rank(value, f"rank_pattern[{pattern!r}]", where)
            for pattern, value in _patterns(values, "rank_pattern", where)
        },
        sha256=sha256,
    )


def _refuse_others(values: Mapping[str, Any], where: str) -> None:
    """Name the formats that are more than two matrices and a factor."""
    kind = str(values.get("peft_type") or "LORA").rpartition(".")[2].upper()
    begun = str(values.get("init_lora_weights")).lower()
    found = [f"peft_type {kind}"] if kind != "LORA" else []
    found += [f"{words} ({key})" for key, words in OTHER_SUMS.items() if values.get(key)]
    if (bias := values.get("bias") or "none") != "none":
        found.append(f"biases that were trained (bias {bias!r})")
    if begun.startswith(OTHER_BASES):
        found.append(f"base weights of its own (init_lora_weights {begun!r})")
    if found:
        raise ValueError(
            f"{where} describes {some(found, 4)}, which is more than a LoRA of plain products. "
            f"{ELSEWHERE}"
        )


def _patterns(values: Mapping[str, Any], key: str, where: str) -> Iterable[tuple[str, Any]]:
    patterns = values.get(key) or {}
    try:
        for pattern in patterns:
            re.compile(pattern)
        return list(patterns.items())
    except (re.error, AttributeError, TypeError) as error:
        raise ValueError(
            f"{where} gives {key} as {patterns!r}: {error}. It maps regular expressions for the "
            "end of module names to numbers, such as {'ffn.0': 16}."
        ) from error


def _alpha(value: Any, name: str, where: str) -> float:
    """A numerator, if it is one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"{where} gives {name} as {value!r}, which is no strength. It is a number above 0: "
            "give the one that the LoRA was trained with."
        )
    return float(value)


def check_alpha(value: float, module: str, file: str) -> float:
    """A numerator that a file holds as a tensor, if it is one.

    Raises:
        ValueError: Zero, negative, or no number.
    """
    return _alpha(value, f"{module}.alpha", f"The LoRA {file}")


def _rank(value: Any, name: str, where: str) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 1 or value % 1:
        raise ValueError(
            f"{where} gives {name} as {value!r}, which is no rank. It is a whole number above 0: "
            "give the one that the LoRA was trained with."
        )
    return int(value)
