"""Panorama clips with artefacts of a known kind and strength: wrong pictures and wrong motion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_kv.data.panorama import COLUMN, SCREEN, SKYLINE, VISIBLE, World, column_tiles, ruler
from lightning_kv.models.codec import PatchCodec

ImageArtefact = Callable[[Tensor, float, World, torch.Generator], Tensor]
"""Degrades frames ``[f, 3, 32, 32]`` of a world by a strength in (0, 1]."""

MotionArtefact = Callable[[Tensor, float, World, torch.Generator], Tensor]
"""Bends the way of the camera, pixels ``[T]``, by a strength in (0, 1]."""


# Painting the columns anew for each clip would take longer than a step of training.
tiles_of, ruler_of = cache(column_tiles), cache(ruler)


@dataclass
class DegradedClip:
    """A clip and the facts about it.

    Args:
        frames: ``[T, 3, 32, 32]`` in [0, 1].
        x: Left edge of the screen on the strip in pixels, ``[T]``.
        intact: What the artefacts leave of each frame, 1 (all) to 0.5, ``[T]``.
        strength: Of each kind of :data:`KINDS`, mean over the frames, ``[kinds]``; 0 where absent.
    """

    frames: Tensor
    x: Tensor
    intact: Tensor
    strength: Tensor


def way(world: World, phase: int, frames: int) -> Tensor:
    """Left edge of the screen in pixels, as the camera of the world pans from ``phase``."""
    return travel(world, phase * world.prompt.stride * COLUMN + pixel_steps(world, frames))


def pixel_steps(world: World, frames: int) -> Tensor:
    """Distance that the camera has travelled at each frame, in pixels."""
    return torch.arange(frames) * world.prompt.stride * COLUMN


def travel(world: World, distance: Tensor) -> Tensor:
    """Where a camera is that has travelled a distance in pixels and turned back at the walls."""
    reach = COLUMN * world.prompt.stride * (world.prompt.size - 1)
    return reach - (distance % (2 * reach) - reach).abs()


def look(world: World, x: Tensor) -> Tensor:
    """What the camera sees at pixels ``x``, ``[T, 3, 32, 32]``."""
    skyline = tiles_of(world.prompt.palette)[world.codes].permute(1, 2, 0, 3).flatten(2)
    strip = torch.cat([skyline, ruler_of(world.prompt.columns)], dim=1)
    return strip.unfold(2, SCREEN, 1).permute(2, 0, 1, 3)[x]


def draw(rng: torch.Generator, low: float, high: float) -> float:
    """A number between two."""
    return low + (high - low) * float(torch.rand((), generator=rng))


def pick(rng: torch.Generator, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def blur(frames: Tensor, strength: float, _: World, rng: torch.Generator) -> Tensor:
    """Gaussian blur, sigma up to 2 px."""
    offsets = torch.arange(-6, 7)
    kernel = torch.exp(-0.5 * (offsets / (2.0 * strength + 1e-3)) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    rows = frames.flatten(0, 1).unsqueeze(1)
    for _ in range(2):
        rows = torch.nn.functional.pad(rows, (6, 6, 0, 0), mode="replicate")
        rows = torch.nn.functional.conv2d(rows, kernel).transpose(2, 3)
    return rows.view_as(frames)


def noise(frames: Tensor, strength: float, _: World, rng: torch.Generator) -> Tensor:
    """White noise, standard deviation up to 0.25."""
    return frames + 0.25 * strength * torch.randn(frames.shape, generator=rng)


def block(frames: Tensor, strength: float, _: World, rng: torch.Generator) -> Tensor:
    """Tiles of 8 x 8 px lose their detail, each with a chance of up to 0.8."""
    flat = torch.nn.functional.avg_pool2d(frames, COLUMN)
    lost = torch.rand(flat[:, :1].shape, generator=rng) < 0.8 * strength
    flat, lost = (x.repeat_interleave(COLUMN, 2).repeat_interleave(COLUMN, 3) for x in (flat, lost))
    return torch.where(lost, flat, frames)


def colour(frames: Tensor, strength: float, _: World, rng: torch.Generator) -> Tensor:
    """The channels are mixed and shifted at random, up to about 0.2."""
    mix = torch.eye(3) + 0.2 * strength * torch.randn(3, 3, generator=rng)
    shift = 0.2 * strength * torch.randn(3, 1, 1, generator=rng)
    return torch.einsum("dc,fchw->fdhw", mix, frames - 0.5) + 0.5 + shift


def saturation(frames: Tensor, strength: float, _: World, rng: torch.Generator) -> Tensor:
    """Colours fade to grey, or grow up to twice as strong."""
    sign = 1 if draw(rng, 0, 1) < 0.5 else -1
    grey = frames.mean(1, keepdim=True)
    return grey + (1 + sign * strength) * (frames - grey)


def columns(frames: Tensor, strength: float, world: World, rng: torch.Generator) -> Tensor:
    """Columns show another building, each with a chance of up to 0.8, anew in each frame."""
    tiles = tiles_of(world.prompt.palette)
    frames = frames.clone()
    for frame in frames:
        for column in range(VISIBLE):
            if draw(rng, 0, 1) < 0.8 * strength:
                span = slice(column * COLUMN, (column + 1) * COLUMN)
                frame[:, :SKYLINE, span] = tiles[pick(rng, 0, 23)]
    return frames


def crossfade(frames: Tensor, strength: float, world: World, rng: torch.Generator) -> Tensor:
    """Another place of the world shines through, up to 0.5."""
    other = look(world, travel(world, pick(rng, 0, 500) * COLUMN + pixel_steps(world, len(frames))))
    return frames + 0.5 * strength * (other - frames)


def freeze(x: Tensor, strength: float, _: World, rng: torch.Generator) -> Tensor:
    """The camera stands still for up to all steps; then it goes on, or is where it should be."""
    steps = len(x) - 1
    count = max(1, round(strength * steps))
    start = pick(rng, 0, steps - count)
    index = torch.arange(len(x))
    if draw(rng, 0, 1) < 0.5:
        held = torch.where(index > start, (index - count).clamp_min(start), index)
    else:
        held = torch.where((index > start) & (index <= start + count), start, index)
    return x[held]


def jump(x: Tensor, strength: float, world: World, rng: torch.Generator) -> Tensor:
    """Up to half of the frames come from another position."""
    places = world.prompt.size
    x = x.clone()
    for frame in torch.randperm(len(x), generator=rng)[: max(1, round(strength * len(x) / 2))]:
        stride = COLUMN * world.prompt.stride
        here = int(x[frame]) // stride
        x[frame] = stride * ((here + pick(rng, 1, places - 1)) % places)
    return x


def speed(x: Tensor, strength: float, world: World, rng: torch.Generator) -> Tensor:
    """The last steps, up to all, are 4, 12 or 24 px wide; no world pans like this."""
    steps = len(x) - 1
    wrong = max(1, round(strength * steps))
    width = (4, 12, 24)[pick(rng, 0, 2)]
    pace = torch.full((steps,), world.prompt.stride * COLUMN)
    pace[steps - wrong :] = width
    reach = COLUMN * world.prompt.stride * (world.prompt.size - 1)
    rising = bool(x[1] > x[0])
    start = int(x[0]) if rising else 2 * reach - int(x[0])
    return travel(world, start + torch.cat([torch.zeros(1, dtype=torch.int64), pace.cumsum(0)]))


def flip(x: Tensor, strength: float, world: World, rng: torch.Generator) -> Tensor:
    """The camera turns back away from the walls, once to three times."""
    stride = COLUMN * world.prompt.stride
    reach = stride * (world.prompt.size - 1)
    turns = torch.randperm(len(x) - 3, generator=rng)[: max(1, round(3 * strength))] + 1
    path, step, due = [int(x[0])], int(x[1] - x[0]), 0
    for frame in range(1, len(x)):
        here = path[-1]
        due += int(frame - 1 in turns)
        if not 0 <= here + step <= reach:
            step = -step
        elif due and 0 < here < reach:
            step, due = -step, due - 1
        path.append(here + step)
    return torch.tensor(path)


IMAGE_ARTEFACTS: dict[str, ImageArtefact] = {
    f.__name__: f for f in (blur, noise, block, colour, saturation, columns, crossfade)
}
MOTION_ARTEFACTS: dict[str, MotionArtefact] = {f.__name__: f for f in (freeze, jump, speed, flip)}
KINDS = (*IMAGE_ARTEFACTS, *MOTION_ARTEFACTS)


def draw_clip(
    world: World,
    codec: PatchCodec,
    rng: torch.Generator,
    strength: dict[str, float],
    frames: int,
    onset: bool = False,
) -> DegradedClip:
    """Draw a clip from a random phase, with artefacts of the given kinds and strengths.

    Args:
        world: What there is to see.
        codec: Clips pass through it, so that they look like a model's.
        rng: Draws everything that is left open.
        strength: Kind to strength in (0, 1]; empty for a clean clip.
        frames: Length T.
        onset: Whether wrong pictures begin after some frames; else all frames are wrong.
    """
    x = way(world, pick(rng, 0, world.prompt.period - 1), frames)
    said = torch.zeros(len(KINDS))
    for kind, steer in MOTION_ARTEFACTS.items():
        if kind in strength:
            x = steer(x, strength[kind], world, rng)
            said[KINDS.index(kind)] = strength[kind]
    shown = codec.decode(codec.encode(look(world, x)))
    intact = torch.ones(frames)
    for kind, paint in IMAGE_ARTEFACTS.items():
        if kind in strength:
            first = pick(rng, 1, frames - 2) if onset else 0
            shown[first:] = paint(shown[first:], strength[kind], world, rng)
            intact[first:] *= 1 - strength[kind] / 2
            said[KINDS.index(kind)] = strength[kind] * (frames - first) / frames
    shown = shown.clamp(0, 1)
    return DegradedClip(shown, x, intact, said)
