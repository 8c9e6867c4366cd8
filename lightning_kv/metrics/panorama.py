"""Memory and camera in the panorama world: what comes back must be what was there.

Everything is decided in latent space against two books, the columns a skyline can have and the
ground under every camera position, so no pretrained network is needed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.functional.panorama import (
    FAR,
    Scene,
    camera_kept,
    recall,
    revisit_error,
    ruler_error,
)
from lightning_kv.metrics.inputs import Labels, Videos, clips_of, latents_of

__all__ = [
    "CameraRule",
    "Recall",
    "RecallFar",
    "RevisitError",
    "RulerError",
    "Scene",
    "WorldMetric",
]


class WorldMetric(ClipMetric):
    """A metric that knows the world of a clip; a subclass writes :meth:`curve`.

    Args:
        kwargs: As in :class:`~lightning_kv.metrics.base.ClipMetric`.
    """

    needs: ClassVar[tuple[str, ...]] = ("latents", "scene")

    @abstractmethod
    def curve(self, latents: Tensor, pixels: Tensor, scene: Scene, given: int = 0) -> Tensor:
        """Value of every frame of one clip, float64 ``[F]``; adds nothing.

        Args:
            latents: ``[F, C, 4, 4]``.
            pixels: ``[F, 3, H, W]`` in [0, 1].
            scene: What is known about the world.
            given: Number of leading frames that were given; they are NaN.
        """

    def update(
        self,
        latents: Tensor | Sequence[Tensor],
        pixels: Videos,
        scenes: Scene | Sequence[Scene],
        *,
        given: int | Sequence[int] = 0,
        ids: Labels = None,
        units: Labels = None,
    ) -> None:
        """Add a batch of clips.

        Args:
            latents: ``[B, F, C, 4, 4]``, or a list of ``[F, C, 4, 4]``.
            pixels: As in :meth:`~lightning_kv.metrics.base.VideoMetric.update`, one pixel frame for
                each latent frame.
            scenes: What is known about the world, of all clips or of each.
            given: Number of leading frames that were given, of all clips or of each.
            ids: As in :meth:`~lightning_kv.metrics.base.VideoMetric.update`.
            units: As there.

        Raises:
            ValueError: Shapes, types, ranges or numbers do not fit.
        """
        clips = latents_of("latents", latents, self.device)
        frames = clips_of("pixels", pixels, self.device)
        worlds = [scenes] * len(clips) if isinstance(scenes, Scene) else scenes
        if not isinstance(worlds, list | tuple) or not all(isinstance(w, Scene) for w in worlds):
            raise ValueError(
                f"'{self.name}' must know the world, a scene of every clip, and was given "
                f"{type(scenes).__name__}. Pass one Scene, or a list of them."
            )
        starts = self._starts(given, len(clips))
        if not len(clips) == len(frames) == len(worlds) == len(starts):
            raise ValueError(
                f"The parts of a batch differ: {len(clips)} latents, {len(frames)} pixels, "
                f"{len(worlds)} scenes, {len(starts)} numbers of given frames. Pass as many of "
                "each."
            )
        for place, clip in enumerate(zip(clips, frames, worlds, starts, strict=True)):
            _check_lengths(place, *clip)
        curves = map(self.curve, clips, frames, (w.to(self.device) for w in worlds), starts)
        self._add_all(curves, ids, units, len(clips))

    def _starts(self, given: int | Sequence[int] | Tensor, clips: int) -> list[int]:
        found = given.tolist() if isinstance(given, Tensor) else given
        found = [found] * clips if isinstance(found, int) else found
        if not isinstance(found, list | tuple) or not all(isinstance(n, int) for n in found):
            raise ValueError(
                f"'{self.name}' must know how many leading frames were given: given is {given!r}. "
                "Pass one whole number, or a list of them."
            )
        return list(found)


def _check_lengths(place: int, latents: Tensor, pixels: Tensor, scene: Scene, given: int) -> None:
    frames = {"latents": len(latents), "pixels": len(pixels)}
    if scene.positions is not None:
        frames["scene.positions"] = len(scene.positions)
    if len(set(frames.values())) != 1 or not 0 <= given <= len(latents):
        raise ValueError(
            f"The parts of clip {place} do not fit: {frames} frames, of which {given} were given. "
            "Pass the same number of frames in all of them, and at most as many given ones."
        )


class RevisitError(WorldMetric):
    """Pixel error where the camera comes back to a place: does the world stay what it was.

    Compared with the ground truth where the context showed the place, otherwise with its first
    generated visit. Without a context, positions are those that the generated ground row shows.

    Example:
        >>> import torch
        >>> latents, pixels = torch.zeros(3, 16, 4, 4), torch.zeros(3, 3, 32, 32)
        >>> scene = Scene(torch.zeros(26, 16, 3), torch.zeros(4, 16, 4), size=4)
        >>> pixels[2] = 0.5
        >>> RevisitError().curve(latents, pixels, scene).tolist()
        [nan, 0.0, 0.25]
    """

    name = "revisit_error"
    unit = "intensity^2"
    higher_is_better = False
    recipe = (
        "mean over frames after the context whose camera position was seen before of the pixel "
        "mse on the top 24 rows, range [0,1], against ground truth where the context showed the "
        "position, else against its first generated visit (without a context: position decoded "
        "from the ruler)"
    )
    needs = ("latents", "pixels", "scene")
    plot_lower_bound = 0.0

    def curve(self, latents: Tensor, pixels: Tensor, scene: Scene, given: int = 0) -> Tensor:
        """Pixel MSE of the skyline in revisited frames."""
        return revisit_error(latents, pixels, scene, given)


class Recall(WorldMetric):
    """Share of the columns that come back right, in the frames of :class:`RevisitError`.

    Example:
        >>> import torch
        >>> latents, pixels = torch.zeros(3, 1, 4, 4), torch.zeros(3, 3, 32, 32)
        >>> codes = torch.arange(26.0).view(26, 1, 1).expand(26, 1, 3)
        >>> scene = Scene(codes, torch.zeros(4, 1, 4), size=4)
        >>> latents[2, :, :3, 0] = 7
        >>> Recall().curve(latents, pixels, scene).tolist()
        [nan, 1.0, 0.75]
    """

    name = "recall"
    unit = "share"
    higher_is_better = True
    recipe = (
        "mean over frames after the context whose camera position was seen before of the share "
        "of columns that decode (nearest latent code) as in the ground truth where the context "
        "showed the position, else as in its first generated visit (without a context: position "
        "decoded from the ruler)"
    )
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    least_gap = 1  # frames since the position was last seen

    def curve(self, latents: Tensor, pixels: Tensor, scene: Scene, given: int = 0) -> Tensor:
        """Share of right columns in revisited frames."""
        return recall(latents, scene, given, self.least_gap)


class RecallFar(Recall):
    """:class:`Recall` of the places last seen at least nine frames ago.

    Example:
        >>> import torch
        >>> latents, pixels = torch.zeros(12, 1, 4, 4), torch.zeros(12, 3, 32, 32)
        >>> latents[:, :, 3] = torch.tensor([0, 1, 2, 3] + [4] * 7 + [1.0]).view(12, 1, 1)
        >>> codes = torch.arange(26.0).view(26, 1, 1).expand(26, 1, 3)
        >>> scene = Scene(codes, torch.arange(5.0).view(5, 1, 1).expand(5, 1, 4), size=5)
        >>> RecallFar().curve(latents, pixels, scene).isnan().sum().item()
        11
    """

    name = "recall_far"
    recipe = f"{Recall.recipe}; only positions last seen at least {FAR} frames ago"
    least_gap = FAR


class RulerError(WorldMetric):
    """Latent error of the ground row: does the camera still follow its rule, and sharply.

    Example:
        >>> import torch
        >>> latents, pixels = torch.ones(2, 16, 4, 4), torch.zeros(2, 3, 32, 32)
        >>> scene = Scene(torch.zeros(26, 16, 3), torch.zeros(4, 16, 4), size=4)
        >>> RulerError().curve(latents, pixels, scene).tolist()
        [1.0, 1.0]
    """

    name = "ruler_error"
    unit = "latent^2"
    higher_is_better = False
    recipe = (
        "mean over frames after the context of the latent mse of the ground row against the "
        "position the camera rule gives (start fitted to the first 6 frames where not known)"
    )
    plot_lower_bound = 0.0

    def curve(self, latents: Tensor, pixels: Tensor, scene: Scene, given: int = 0) -> Tensor:
        """Latent MSE of the ground row of every frame."""
        return ruler_error(latents, scene, given)


class CameraRule(WorldMetric):
    """Share of frames in which the camera is where its rule puts it.

    Example:
        >>> import torch
        >>> book = torch.arange(4.0).view(4, 1, 1).expand(4, 1, 4)
        >>> ground = torch.tensor([0.0, 1, 2, 3, 2, 1, 3]).view(7, 1, 1, 1).expand(7, 1, 4, 4)
        >>> scene = Scene(torch.zeros(26, 1, 3), book, size=4)
        >>> CameraRule().curve(ground, torch.zeros(7, 3, 32, 32), scene).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    """

    name = "camera_rule"
    unit = "share"
    higher_is_better = True
    recipe = (
        "share of frames after the context whose position, decoded from the ruler, is the one "
        "the camera rule gives (start fitted to the first 6 frames where not known)"
    )
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def curve(self, latents: Tensor, pixels: Tensor, scene: Scene, given: int = 0) -> Tensor:
        """One where the position is right, else zero."""
        return camera_kept(latents, scene, given)
