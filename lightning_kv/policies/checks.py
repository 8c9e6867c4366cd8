"""Settings of parts that cannot work are refused when a policy is built."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.view import CacheView


def choice(part: Any, **allowed: tuple[Any, ...]) -> None:
    """Refuse a setting that is none of the known words.

    Raises:
        ValueError: Names the setting, what it is and what it may be.
    """
    for name, words in allowed.items():
        value = getattr(part, name)
        if value not in words:
            known = ", ".join("none" if word is None else str(word) for word in words)
            raise ValueError(
                f"{name}={value!r} of the {part.kind} part {part.name!r} is unknown. "
                f"Use one of: {known}."
            )


def between(part: Any, low: float, high: float | None, *names: str) -> None:
    """Refuse numbers outside ``[low, high]``.

    Raises:
        ValueError: Names the setting, what it is and what it may be.
    """
    for name in names:
        value = getattr(part, name)
        if not (value >= low and (high is None or value <= high)):  # NaN fails too
            room = f"{low} or more" if high is None else f"from {low} to {high}"
            raise ValueError(
                f"{name}={value} of the {part.kind} part {part.name!r} is out of range. "
                f"It must be {room}."
            )


def portion(part: Any, *names: str, unit: str = "frames", whole: str = "the budget") -> None:
    """Refuse what is neither a number of frames (0, 1, 2, ...) nor a share from 0 to below 1.

    Args:
        part: That has the settings.
        names: Of the settings.
        unit: What is counted.
        whole: What the share is of.

    Raises:
        ValueError: Names the setting, what it is and what it may be.
    """
    for name in names:
        value = getattr(part, name)
        if not (value >= 0 and (isinstance(value, int) or value < 1)):
            raise ValueError(
                f"{name}={value} of the {part.kind} part {part.name!r} is neither {unit} nor a "
                f"share of {whole}. Give a whole number of {unit}, or a share from 0 to below 1."
            )


def step_of(part: Any, name: str, steps: int) -> int:
    """Index of a denoising step that a setting gives, or below 1 as a share of the steps.

    A share means a step before the last, whose estimate is what becomes final.

    Raises:
        ValueError: There are not that many.
    """
    value = getattr(part, name)
    if value >= steps:
        raise ValueError(
            f"{name}={value} of the {part.kind} part {part.name!r} is beyond the {steps} denoising "
            f"steps of this sampler. Use 0 to {steps - 1}, or a share below 1."
        )
    return int(value) if value >= 1 else max(0, min(int(value * steps), steps - 2))


def same(part: Any, other: Any, *names: str) -> None:
    """Refuse settings that two parts of a policy have in common and that differ.

    Raises:
        ValueError: Names both parts, what each has, and that one value would do for both.
    """
    for name in names:
        mine, theirs = getattr(part, name), getattr(other, name)
        if mine != theirs:
            mine, theirs = (str(getattr(x, "file", None) or x)[:60] for x in (mine, theirs))
            raise ValueError(
                f"{name}={mine} of the {part.kind} part {part.name!r} contradicts {name}={theirs} "
                f"of the {other.kind} part {other.name!r}. Give both the same {name}, under "
                f"`{part.kind}` and under `{other.kind}`."
            )


def check_shown(part: Any, view: CacheView, latents: bool, off: Tensor | None) -> None:
    """Refuse, at the commit of a generated chunk after the first, estimates that tell nothing.

    Args:
        part: That compares clean estimates with final latents.
        view: Where it was asked.
        latents: Whether it has been shown final latents.
        off: How far the estimates of the newest frames were from them; None without any.

    Raises:
        ValueError: Nobody has shown them. That they are the final latents themselves is found on
            the device, and raised when the host reads.
    """
    step, who = view.step, named(part, view)
    if off is not None:
        view.doubt(
            (off == 0).all(),
            f"{who} was shown the final latents as an estimate of them, and would drop everything. "
            "Use a sampler of two denoising steps or more, and a step before the last.",
        )
    elif step.phase != "prefill" and step.final[0]:
        lacks = "clean estimates" if latents else "final latents"
        raise ValueError(
            f"{who} compares clean estimates with final latents, and was shown no {lacks} of frame "
            f"{step.final[0]}. Use rollout(...), or call session.on_prediction(...) after each "
            "denoising pass and session.on_final(...) once frames are final, before "
            "session.finish(...)."
        )
