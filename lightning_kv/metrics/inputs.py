"""What users hand to ``update``, checked once for all metrics: videos, and one label per video."""

from __future__ import annotations

import hashlib
import math
import reprlib
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

Videos = Tensor | Sequence[Tensor]
"""``[B, T, 3, H, W]``, uint8 or float in [0, 1]; or videos ``[T, 3, H, W]`` of any lengths."""

Labels = Sequence["str | int"] | Tensor | np.ndarray | None
"""One per video: texts, whole numbers, or int64 ``[B]``; None where nobody knows."""

NOBODY = -(2**63)
"""Number of a clip, or unit, that was given none: nobody's own, and it counts alone."""

AXES = "[videos, frames, 3, height, width]"
LATENT_AXES = "[clips, frames, channels, height, width]"


def clips_of(
    what: str,
    videos: Any,
    device: torch.device,
    like: Sequence[Tensor] | None = None,
    of: str = "",
) -> list[Tensor]:
    """The videos of a batch one by one, ``[T, 3, H, W]`` floats in [0, 1].

    Args:
        what: Name of the argument, for errors.
        videos: What was given.
        device: Where to.
        like: Videos that these are compared with: they must have the same shapes.
        of: Name of the metric that compares.

    Raises:
        ValueError: They are no videos, or do not fit the others.

    Example:
        >>> [len(clip) for clip in clips_of("preds", torch.zeros(2, 5, 3, 8, 8), "cpu")]
        [5, 5]
    """
    if videos is None and of:
        raise missing_target(of, what)
    batched = isinstance(videos, Tensor)
    if (batched and videos.ndim != 5) or (not batched and not isinstance(videos, list | tuple)):
        raise ValueError(
            f"These are no videos: {what} is {shown(videos)}. Pass a tensor {AXES}, or a list of "
            f"videos [frames, 3, height, width].{hint(videos)}"
        )
    clips = [_pixels(what, place, video, device) for place, video in enumerate(videos)]
    if not clips:
        raise ValueError(f"{what} holds no video: 0 were given. Pass one or more.")
    if like is not None:
        _same(what, clips, like)
    return clips


def missing_target(metric: str, what: str) -> ValueError:
    """The error where a metric that compares was given one video alone."""
    return ValueError(
        f"'{metric}' compares two videos and was given one: {what} is missing. Pass "
        f"update(preds, {what}), or leave the metric out."
    )


def _pixels(what: str, place: int, video: Any, device: torch.device) -> Tensor:
    shape = shown(video)
    if not isinstance(video, Tensor) or video.ndim != 4 or not video.numel():
        raise ValueError(
            f"This is no video: number {place} of {what} is {shape}. Pass [frames, 3, height, "
            f"width].{hint(video)}"
        )
    if video.shape[1] != 3:
        turned = " It looks like channels last: permute(0, 3, 1, 2)." * (video.shape[3] == 3)
        first = video.shape[0] == 3 and video.shape[1] not in (1, 4)
        turned = turned or " It looks like channels first: transpose(0, 1)." * first
        raise ValueError(
            f"The axes of a video are [frames, 3, height, width], and number {place} of {what} is "
            f"{shape}.{turned or ' Pass RGB frames.'}"
        )
    if video.dtype == torch.uint8:
        return video.to(device).float() / 255
    low, high = (end.item() for end in video.aminmax())
    # Written so that NaN is refused too.
    if not (video.is_floating_point() and low >= 0 and high <= 1):
        raise ValueError(
            f"Pixels are out of range: number {place} of {what} is {video.dtype} from {low:g} to "
            f"{high:g}. Pass uint8, or floats in [0, 1]: divide 8-bit values by 255, clamp what a "
            "decoder overshoots."
        )
    return video.to(device)


def shown(given: Any) -> str:
    """What stands in the place of a tensor, in short."""
    if isinstance(given, Tensor):
        return str(tuple(given.shape))
    if isinstance(given, np.ndarray):
        return f"a numpy array {given.shape}"
    return type(given).__name__


def hint(given: Any) -> str:
    """What to do with a numpy array in the place of a tensor; else nothing."""
    array = isinstance(given, np.ndarray)
    return " An array becomes a tensor with torch.from_numpy(array)." * array


def _same(what: str, clips: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    if len(clips) != len(like):
        raise ValueError(
            f"Videos are compared one with one: {len(like)} in preds, {len(clips)} in {what}. Pass "
            "as many."
        )
    for place, (one, other) in enumerate(zip(clips, like, strict=True)):
        if one.shape != other.shape:
            raise ValueError(
                f"Two videos cannot be compared frame by frame: number {place} is "
                f"{tuple(other.shape)} in preds and {tuple(one.shape)} in {what}. Pass the same "
                "number of frames and the same size: cut or resize one of them."
            )


def latents_of(
    what: str, latents: Any, device: torch.device, like: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The latents of a batch of clips one by one, ``[F, C, h, w]``.

    Args:
        what: Name of the argument, for errors.
        latents: What was given.
        device: Where to.
        like: Latents that these are compared with: they must have the same shapes.

    Raises:
        ValueError: They are no latents, or do not fit the others.

    Example:
        >>> [len(clip) for clip in latents_of("preds", torch.zeros(2, 5, 16, 4, 4), "cpu")]
        [5, 5]
    """
    several = isinstance(latents, list | tuple) or (isinstance(latents, Tensor) and latents.ndim)
    if not several or not len(latents):
        given = "missing" if latents is None else shown(latents)
        raise ValueError(
            f"These are no latents: {what} is {given}. Pass a tensor {LATENT_AXES}, or a list of "
            f"[frames, channels, height, width].{hint(latents)}"
        )
    for place, clip in enumerate(latents):
        if not isinstance(clip, Tensor) or clip.ndim != 4 or not clip.numel():
            raise ValueError(
                f"These are no latents of a clip: number {place} of {what} is {shown(clip)}. Pass "
                f"a tensor {LATENT_AXES}, or a list of [frames, channels, height, width]."
                f"{hint(clip)}"
            )
        if not clip.is_floating_point() or not clip.isfinite().all():
            raise ValueError(
                f"Latents must be finite numbers: number {place} of {what} is {clip.dtype}, with "
                "NaN or infinite values or whole numbers. Record this rollout as failed instead of "
                "measuring it."
            )
    clips = [clip.to(device) for clip in latents]
    if like is not None:
        _same(what, clips, like)
    return clips


def labels(what: str, given: Labels, clips: int) -> list[Any]:
    """One label per video, as texts and whole numbers; Nones where none are given.

    Raises:
        ValueError: Their number or type does not fit.

    Example:
        >>> labels("ids", torch.tensor([3, 4]), 2), labels("ids", None, 1)
        ([3, 4], [None])
    """
    if given is None:
        return [None] * clips
    found = None
    if isinstance(given, Tensor | np.ndarray):
        came = f"{given.dtype} {tuple(given.shape)}"
        found = given.tolist() if given.ndim == 1 else None
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        came, found = f"{len(given)} of them", list(given)
    else:
        came = reprlib.repr(given)
    other = [one for one in found or () if not isinstance(one, str) and not _whole(one)]
    if other:
        came += f", {reprlib.repr(other[0])} among them"
    if found is None or other or len(found) != clips:
        raise ValueError(
            f"The {what} do not fit {clips} videos: {came}. Pass one text or whole number for "
            f"each, or int64 [{clips}]."
        )
    return [one if isinstance(one, str) else int(one) for one in found]


def numbered(what: str, given: Labels, clips: int) -> list[int]:
    """:func:`labels` as numbers; see :func:`number_of`.

    Raises:
        ValueError: They do not fit, or a number has more than 64 bits.
    """
    return [number_of(one) for one in labels(what, given, clips)]


def told(
    metric: str, prompts: Labels, table: Sequence[str] | None, clips: int, needed: bool
) -> list[Any]:
    """What the model was told for each video: texts, also of those that are places in a table.

    Args:
        metric: Its name, for errors.
        prompts: Texts, or places in the table; None where nobody knows.
        table: Of texts; without it places are left as they are.
        clips: How many videos there are.
        needed: Whether the texts must be known.

    Raises:
        ValueError: They do not fit, or there is no such place, or no table.

    Example:
        >>> told("mine", torch.tensor([1]), ["a dog", "a cat"], 1, needed=True)
        ['a cat']
    """
    found = labels("prompts", prompts, clips)
    places = [one for one in found if isinstance(one, int)]
    if not places or (table is None and not needed):
        return found
    if table is None:
        raise ValueError(
            f"'{metric}' was given prompts as places in a table, int64 [{len(places)}], and has "
            "none. Make it with prompt_table=[...], or pass the texts."
        )
    if wrong := [place for place in places if not 0 <= place < len(table)]:
        raise ValueError(
            f"'{metric}' was given prompts as places in a table, and there is no place {wrong[0]} "
            f"in one of {len(table)} texts. Pass places from 0 to {len(table) - 1}, or the texts."
        )
    return [table[one] if isinstance(one, int) else one for one in found]


def per_clip(what: str, given: Any, clips: int) -> list[float | None]:
    """One number per video.

    Raises:
        ValueError: Their number does not fit, or one is no number above 0.
    """
    came = reprlib.repr(given)
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    found = list(given) if isinstance(given, list | tuple) else [given] * clips
    if len(found) != clips or not all(one is None or _positive(one) for one in found):
        raise ValueError(
            f"{what} does not fit {clips} videos: {came}. Pass one number above 0, or one for "
            "each video."
        )
    return [None if one is None else float(one) for one in found]


def _whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _positive(number: Any) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool) and 0 < number < math.inf


def number_of(label: str | int | None) -> int:
    """A label as a number that is the same in every process; ``NOBODY`` for none.

    Raises:
        ValueError: It is neither a text nor a whole number of 64 bits.

    Example:
        >>> number_of(7), number_of("a red fox") == number_of("a red fox")
        (7, True)
        >>> number_of(None) == NOBODY
        True
    """
    if label is None:
        return NOBODY
    if isinstance(label, str):
        return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big") >> 1
    if not _whole(label):
        raise ValueError(
            f"An id or a unit is a text or a whole number: {label!r} was given. Pass one of these."
        )
    if not NOBODY < label < -NOBODY:
        raise ValueError(
            f"An id or a unit does not fit 64 bits: {label} was given. Pass a number between "
            f"{NOBODY} and {-NOBODY}, both left out, or a text such as '{label}'."
        )
    return int(label)


def refuse_resampled(metric: str, given: dict[str, Any]) -> None:
    """Refuse labels inside a BootStrapper.

    It draws videos again and leaves the labels as they are, or draws clips where whole units have
    to be drawn.

    Raises:
        ValueError: A BootStrapper is calling, and there are labels.
    """
    named = [name for name, value in given.items() if value is not None]
    if named and bootstrapped():
        raise ValueError(
            f"A BootStrapper draws the videos of '{metric}' again, but not what belongs to "
            f"them: {', '.join(named)}. Use the metric's own interval(), which draws whole "
            "units, or update without them."
        )


def bootstrapped() -> bool:
    """Whether a BootStrapper of torchmetrics is calling."""
    from torchmetrics.wrappers import BootStrapper

    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), BootStrapper):
            return True
        frame = frame.f_back
    return False
