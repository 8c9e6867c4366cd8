"""The panorama world: what the books and the rule say of the latents of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SKYLINE_PIXELS = 24  # rows above the ground
SKYLINE_TOKENS = 3  # the same in latent rows; the ground is the last one
FAR = 9  # frames: from this gap on a place is far back
PHASE_FRAMES = 6  # frames that tell where the camera started


@dataclass(frozen=True)
class Scene:
    """What is known about the world of one clip.

    Args:
        code_book: ``[26, C, 3]`` latents of the three skyline tokens of each column code.
        ruler_book: ``[n, C, 4]`` latents of the ground row at each camera position.
        size: Number n of camera positions.
        positions: int64 ``[F]``, where the rule puts the camera; None if its start is not known.
        truth_pixels: ``[F, 3, H, W]`` what the world looks like; None in free generation.
        truth_latents: ``[F, C, 4, 4]`` of the same.

    Raises:
        ValueError: The ruler book has another size, or the truth is not given whole.

    Example:
        >>> scene = Scene(torch.zeros(26, 16, 3), torch.zeros(5, 16, 4), size=5)
        >>> scene.has_truth
        False
    """

    code_book: Tensor
    ruler_book: Tensor
    size: int
    positions: Tensor | None = None
    truth_pixels: Tensor | None = None
    truth_latents: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.ruler_book) != self.size:
            raise ValueError(
                f"The ruler book has {len(self.ruler_book)} rows for {self.size} camera "
                "positions. Pass one row for each position, 0 to n - 1."
            )
        truth = (self.positions, self.truth_pixels, self.truth_latents)
        lengths = [None if part is None else len(part) for part in truth]
        if self.has_truth and len(set(lengths)) != 1:
            raise ValueError(
                "The ground truth is not whole: positions, pixels and latents have "
                f"{lengths} frames. Pass all three at the same length, or neither pixels nor "
                "latents."
            )

    @property
    def has_truth(self) -> bool:
        """True where a context was given, so that the world is determined."""
        return self.truth_pixels is not None or self.truth_latents is not None

    def to(self, device: torch.device | str) -> Scene:
        """The same on a device."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Scene(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in parts.items()})

    def rule(self, latents: Tensor) -> Tensor:
        """Where the camera should be in every frame, int64 ``[F]``.

        Where the start is not known it is read off the first frames of ``latents``.
        """
        if self.positions is not None:
            return self.positions
        return fit_positions(latents, self.ruler_book)


def decode_columns(latents: Tensor, code_book: Tensor) -> Tensor:
    """Nearest code of each of the four columns on screen.

    Args:
        latents: ``[F, C, 4, 4]``; rows 0 to 2 are the skyline, row 3 the ground.
        code_book: ``[codes, C, 3]``.

    Returns:
        int64 ``[F, 4]``.

    Example:
        >>> book = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 3)
        >>> decode_columns(torch.full((1, 1, 4, 4), 1.2), book).tolist()
        [[1, 1, 1, 1]]
    """
    columns = latents[:, :, :SKYLINE_TOKENS].permute(0, 3, 1, 2)  # [F, 4, C, 3]
    return _distances(columns.flatten(0, 1), code_book).argmin(1).view(columns.shape[:2])


def decode_positions(latents: Tensor, ruler_book: Tensor) -> Tensor:
    """Camera position whose ground is nearest to the generated one.

    Args:
        latents: ``[F, C, 4, 4]``.
        ruler_book: ``[n, C, 4]``.

    Returns:
        int64 ``[F]``, 0 to n - 1.

    Example:
        >>> book = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 4)
        >>> decode_positions(torch.full((1, 1, 4, 4), 1.8), book).tolist()
        [2]
    """
    return ruler_errors(latents, ruler_book).argmin(1)


def ruler_errors(latents: Tensor, ruler_book: Tensor) -> Tensor:
    """Mean squared error of the ground row against the ground at every camera position.

    Args:
        latents: ``[F, C, 4, 4]``.
        ruler_book: ``[n, C, 4]``.

    Returns:
        float64 ``[F, n]``.

    Example:
        >>> book = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 4)
        >>> ruler_errors(torch.full((1, 1, 4, 4), 2.0), book).tolist()
        [[4.0, 1.0, 0.0]]
    """
    return _distances(latents[:, :, SKYLINE_TOKENS], ruler_book)


def last_seen(positions: Tensor) -> Tensor:
    """Frames since the camera was last at the same position, -1 if it never was.

    Args:
        positions: int64 ``[F]``.

    Returns:
        int64 ``[F]``.

    Example:
        >>> last_seen(torch.tensor([0, 1, 2, 1, 0])).tolist()
        [-1, -1, -1, 2, 4]
    """
    frame = torch.arange(len(positions), device=positions.device)
    gap = frame.unsqueeze(1) - frame
    seen = (positions.unsqueeze(1) == positions) & (gap > 0)
    nearest = gap.masked_fill(~seen, len(positions)).amin(1)
    return nearest.masked_fill(~seen.any(1), -1)


def first_visit(positions: Tensor) -> Tensor:
    """First frame in which the camera was at the position of each frame.

    Args:
        positions: int64 ``[F]``.

    Returns:
        int64 ``[F]``.

    Example:
        >>> first_visit(torch.tensor([0, 1, 2, 1, 0])).tolist()
        [0, 1, 2, 1, 0]
    """
    frame = torch.arange(len(positions), device=positions.device)
    same = positions.unsqueeze(1) == positions
    return torch.where(same, frame, len(positions)).amin(1)


def camera_rule(start: int, frames: int, size: int) -> Tensor:
    """The rule: one position per frame along ``size`` positions, turning back at both ends.

    Args:
        start: Frame of the period of ``2 (size - 1)`` at which the camera starts.
        frames: Number F of frames.
        size: Number n of camera positions, at least 2.

    Returns:
        int64 ``[F]``.

    Example:
        >>> camera_rule(1, 6, size=4).tolist()
        [1, 2, 3, 2, 1, 0]
    """
    step = torch.arange(start, start + frames) % (2 * (size - 1))
    return torch.minimum(step, 2 * (size - 1) - step)


def fit_positions(latents: Tensor, ruler_book: Tensor) -> Tensor:
    """Positions by the rule, from the start that best explains the first six generated frames.

    Args:
        latents: ``[F, C, 4, 4]``.
        ruler_book: ``[n, C, 4]``.

    Returns:
        int64 ``[F]``.

    Example:
        >>> book = torch.arange(4.0).view(4, 1, 1).expand(4, 1, 4)
        >>> ground = torch.tensor([2.1, 1.0, 0.2, 1.1]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
        >>> fit_positions(ground, book).tolist()
        [2, 1, 0, 1]
    """
    size = len(ruler_book)
    candidates = torch.stack(
        [camera_rule(start, len(latents), size) for start in range(2 * (size - 1))]
    ).to(latents.device)
    errors = ruler_errors(latents[:PHASE_FRAMES], ruler_book)  # [6, n]
    fit = errors.gather(1, candidates[:, :PHASE_FRAMES].T).mean(0)
    return candidates[fit.argmin()]


def revisit_error(latents: Tensor, pixels: Tensor, scene: Scene, given: int = 0) -> Tensor:
    """Mean squared pixel error of the skyline of every frame in which the camera comes back.

    Compared with the ground truth where the given frames showed the place, otherwise with its first
    generated visit. Without given frames, positions are those that the generated ground row shows.

    Args:
        latents: ``[F, C, 4, 4]``.
        pixels: ``[F, 3, H, W]`` in [0, 1].
        scene: What is known about the world.
        given: Number of leading frames that were given.

    Returns:
        float64 ``[F]``; NaN in given frames, and where the camera was never before.

    Example:
        >>> latents, pixels = torch.zeros(3, 16, 4, 4), torch.zeros(3, 3, 32, 32)
        >>> scene = Scene(torch.zeros(26, 16, 3), torch.zeros(4, 16, 4), size=4)
        >>> pixels[2] = 0.5
        >>> revisit_error(latents, pixels, scene).tolist()
        [nan, 0.0, 0.25]
    """
    gap, visit, shown = _visits(latents, scene, given)
    target = _of_visit(pixels, visit, shown, scene.truth_pixels)
    difference = (pixels.double() - target.double())[:, :, :SKYLINE_PIXELS]
    return _after(given, difference.square().flatten(1).mean(1).masked_fill(gap < 0, torch.nan))


def recall(latents: Tensor, scene: Scene, given: int = 0, least_gap: int = 1) -> Tensor:
    """Share of the columns of every frame that come back right, against what ``revisit_error`` is.

    Args:
        latents: ``[F, C, 4, 4]``.
        scene: What is known about the world.
        given: Number of leading frames that were given.
        least_gap: Frames since the camera was last there, at least.

    Returns:
        float64 ``[F]``; NaN in given frames, and where the camera does not come back.

    Example:
        >>> latents = torch.zeros(3, 1, 4, 4)
        >>> codes = torch.arange(26.0).view(26, 1, 1).expand(26, 1, 3)
        >>> scene = Scene(codes, torch.zeros(4, 1, 4), size=4)
        >>> latents[2, :, :3, 0] = 7
        >>> recall(latents, scene).tolist()
        [nan, 1.0, 0.75]
    """
    gap, visit, shown = _visits(latents, scene, given)
    target = _of_visit(latents, visit, shown, scene.truth_latents)
    right = decode_columns(latents, scene.code_book) == decode_columns(target, scene.code_book)
    return _after(given, right.double().mean(1).masked_fill(gap < least_gap, torch.nan))


def ruler_error(latents: Tensor, scene: Scene, given: int = 0) -> Tensor:
    """Mean squared latent error of the ground row against the ground where the camera should be.

    Args:
        latents: ``[F, C, 4, 4]``.
        scene: What is known about the world.
        given: Number of leading frames that were given.

    Returns:
        float64 ``[F]``; NaN in given frames.

    Example:
        >>> scene = Scene(torch.zeros(26, 16, 3), torch.zeros(4, 16, 4), size=4)
        >>> ruler_error(torch.ones(2, 16, 4, 4), scene, given=1).tolist()
        [nan, 1.0]
    """
    errors = ruler_errors(latents, scene.ruler_book)
    return _after(given, errors.gather(1, scene.rule(latents).unsqueeze(1)).squeeze(1))


def camera_kept(latents: Tensor, scene: Scene, given: int = 0) -> Tensor:
    """1 in every frame in which the camera is where its rule puts it, 0 in others.

    Args:
        latents: ``[F, C, 4, 4]``.
        scene: What is known about the world.
        given: Number of leading frames that were given.

    Returns:
        float64 ``[F]``; NaN in given frames.

    Example:
        >>> book = torch.arange(4.0).view(4, 1, 1).expand(4, 1, 4)
        >>> ground = torch.tensor([0.0, 1, 2, 3, 2, 1, 3]).view(7, 1, 1, 1).expand(7, 1, 4, 4)
        >>> camera_kept(ground, Scene(torch.zeros(26, 1, 3), book, size=4)).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    """
    decoded = decode_positions(latents, scene.ruler_book)
    return _after(given, (decoded == scene.rule(latents)).double())


def _visits(latents: Tensor, scene: Scene, given: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gap since the position was last seen, its first visit, and whether that one was given."""
    if not scene.has_truth:
        positions = decode_positions(latents, scene.ruler_book)
        return last_seen(positions), first_visit(positions), None
    visit = first_visit(scene.positions)
    return last_seen(scene.positions), visit, visit < given


def _of_visit(own: Tensor, visit: Tensor, shown: Tensor | None, truth: Tensor | None) -> Tensor:
    """What the first visit showed: the truth where that was given, else what was generated."""
    if shown is None:
        return own[visit]
    return torch.where(shown.view(-1, 1, 1, 1), truth, own[visit])


def _after(given: int, values: Tensor) -> Tensor:
    """Given frames are right by construction, and do not count."""
    index = torch.arange(len(values), device=values.device)
    return values.masked_fill(index < given, torch.nan)


def _distances(samples: Tensor, book: Tensor) -> Tensor:
    """Mean squared difference of samples ``[N, ...]`` and entries ``[K, ...]``, ``[N, K]``."""
    a, b = samples.double().flatten(1), book.double().flatten(1)
    # Without the shortcut a^2 - 2ab + b^2, whose rounding would hide errors near zero.
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / a.shape[1]
