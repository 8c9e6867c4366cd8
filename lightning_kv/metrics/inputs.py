"""What users hand to ``update``, checked once for all metrics: videos, and one label per video."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Videos = Tensor | Sequence[Tensor]
"""``[B, T, 3, H, W]``, uint8 or float in [0, 1]; or videos ``[T, 3, H, W]`` of any lengths."""

Labels = Sequence["str | int"] | Tensor | None
"""One per video: texts, numbers, or int64 ``[B]``; None where nobody knows."""

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
        given = tuple(videos.shape) if batched else type(videos).__name__
        raise ValueError(
            f"These are no videos: {what} is {given}. Pass a tensor {AXES}, or a list of videos "
            "[frames, 3, height, width]."
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
    shape = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
    if not isinstance(video, Tensor) or video.ndim != 4 or not video.numel():
        raise ValueError(
            f"This is no video: number {place} of {what} is {shape}. Pass [frames, 3, height, "
            "width]."
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
    if not isinstance(latents, Tensor | list | tuple) or not len(latents):
        given = "missing" if latents is None else type(latents).__name__
        raise ValueError(
            f"These are no latents: {what} is {given}. Pass a tensor {LATENT_AXES}, or a list of "
            "[frames, channels, height, width]."
        )
    for place, clip in enumerate(latents):
        shape = tuple(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
        if not isinstance(clip, Tensor) or clip.ndim != 4 or not clip.numel():
            raise ValueError(
                f"These are no latents of a clip: number {place} of {what} is {shape}. Pass a "
                f"tensor {LATENT_AXES}, or a list of [frames, channels, height, width]."
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
    """One label per video, as texts and numbers; Nones where none are given.

    Raises:
        ValueError: Their number or type does not fit.

    Example:
        >>> labels("ids", torch.tensor([3, 4]), 2), labels("ids", None, 1)
        ([3, 4], [None])
    """
    if given is None:
        return [None] * clips
    if isinstance(given, Tensor):
        whole = given.ndim == 1 and not given.is_floating_point() and given.dtype != torch.bool
        shown = f"{given.dtype} {tuple(given.shape)}"
        found = given.tolist()
    else:
        whole = not isinstance(given, str) and all(
            isinstance(one, str | int) and not isinstance(one, bool) for one in given
        )
        shown = repr(given) if isinstance(given, str) else f"{len(given)} of them"
        found = list(given)
    if not whole or len(found) != clips:
        raise ValueError(
            f"The {what} do not fit {clips} videos: {shown}. Pass one text or whole number for "
            f"each, or int64 [{clips}]."
        )
    return found


def per_clip(what: str, given: Any, clips: int) -> list[float | None]:
    """One number per video.

    Raises:
        ValueError: Their number does not fit, or one is not above 0.
    """
    if isinstance(given, Tensor):
        given = given.tolist()
    several = isinstance(given, list | tuple)
    found = list(given) if several else [given] * clips
    if len(found) != clips or not all(one is None or one > 0 for one in found):
        raise ValueError(
            f"{what} does not fit {clips} videos: {given}. Pass one number above 0, or one for "
            "each video."
        )
    return [None if one is None else float(one) for one in found]


def number_of(label: str | int | None) -> int:
    """A label as a number that is the same in every process; -1 for none.

    Example:
        >>> number_of(7), number_of(None), number_of("a red fox") == number_of("a red fox")
        (7, -1, True)
    """
    if label is None:
        return -1
    if isinstance(label, str):
        return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big") >> 1
    return label


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
