"""The panorama world: a camera pans over a drawn skyline and turns back at the walls.

Where the camera looks can be computed from the last frames; *what* it sees on the way back can
not, it must be remembered. So a cache that forgets is caught by arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMN = 8  # pixels: width of one skyline column
SCREEN = 32  # pixels: height and width of a frame
SKYLINE = 24  # pixels: the rows above the ruler
VISIBLE = SCREEN // COLUMN  # columns on screen
HEIGHTS = (4, 8, 12, 16, 20, 24)  # pixels
RULER_PERIODS = (256.0, 64.0, 32.0)  # pixels
LEFT_WALL, RIGHT_WALL = 24, 25  # codes after the 4 x 6 buildings
CODES = 26
REPEAT = 0.3  # chance that a column repeats its left neighbour

# Sky, then four building colours; RGB in [0, 1].
PALETTES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "dusk": (
        (0.95, 0.62, 0.45),
        (0.35, 0.12, 0.40),
        (0.62, 0.20, 0.32),
        (0.18, 0.22, 0.48),
        (0.80, 0.78, 0.30),
    ),
    "noon": (
        (0.55, 0.80, 0.97),
        (0.80, 0.30, 0.22),
        (0.92, 0.78, 0.42),
        (0.30, 0.55, 0.28),
        (0.42, 0.42, 0.50),
    ),
    "night": (
        (0.08, 0.08, 0.22),
        (0.20, 0.50, 0.60),
        (0.55, 0.25, 0.62),
        (0.72, 0.66, 0.55),
        (0.12, 0.32, 0.18),
    ),
    "mist": (
        (0.78, 0.80, 0.80),
        (0.50, 0.62, 0.72),
        (0.66, 0.48, 0.44),
        (0.28, 0.30, 0.34),
        (0.86, 0.88, 0.60),
    ),
}
SPEEDS = {"slow": 1, "fast": 2}  # columns per frame
SIZES = tuple(range(4, 15))  # camera positions between the walls
STARTS = ("left", "any")
VOCABULARY = (*PALETTES, *SPEEDS, *(f"n{n}" for n in SIZES), *STARTS)


@dataclass(frozen=True)
class PanoramaPrompt:
    """What a prompt such as ``"dusk fast n13 left"`` says.

    Args:
        palette: Name of the colours.
        speed: ``slow`` (1 column per frame) or ``fast`` (2).
        size: Number n of camera positions; the camera is back after 2 (n - 1) frames.
        start: ``left`` (at the left wall, moving right) or ``any``.
    """

    palette: str
    speed: str
    size: int
    start: str

    @classmethod
    def parse(cls, text: str) -> PanoramaPrompt:
        """Read a prompt of four words.

        Raises:
            ValueError: A word is missing, unknown or out of place.
        """
        words = text.split()
        kinds = (tuple(PALETTES), tuple(SPEEDS), tuple(f"n{n}" for n in SIZES), STARTS)
        known = [word in kind for word, kind in zip(words, kinds, strict=False)]
        if len(words) != len(kinds) or not all(known):
            raise ValueError(
                f"The panorama world does not understand the prompt {text!r}. "
                f"It reads four words, one of each: {', '.join('|'.join(kind) for kind in kinds)}. "
                "Try 'dusk fast n13 left'."
            )
        return cls(words[0], words[1], int(words[2][1:]), words[3])

    @property
    def text(self) -> str:
        """The four words."""
        return f"{self.palette} {self.speed} n{self.size} {self.start}"

    @property
    def stride(self) -> int:
        """Columns per frame."""
        return SPEEDS[self.speed]

    @property
    def period(self) -> int:
        """Frames until the camera is back where it was, moving the same way."""
        return 2 * (self.size - 1)

    @property
    def columns(self) -> int:
        """Columns of the whole strip, walls included."""
        return VISIBLE + self.stride * (self.size - 1)


@dataclass(frozen=True)
class World:
    """One drawn panorama: the codes of its columns and where the camera starts.

    Args:
        prompt: The prompt it was drawn for.
        codes: int64 ``[columns]``; 0 to 23 are buildings (colour x 6 + height), then the walls.
        phase: Frame of the period at which the camera starts.
    """

    prompt: PanoramaPrompt
    codes: Tensor
    phase: int

    def positions(self, frames: int) -> Tensor:
        """Camera position (0 to n - 1) of the first ``frames`` frames, int64."""
        return bounce(torch.arange(self.phase, self.phase + frames), self.prompt.size)

    def strip(self) -> Tensor:
        """The whole panorama, float32 ``[3, 32, 8 * columns]`` in [0, 1]."""
        tiles = column_tiles(self.prompt.palette)[self.codes]  # [columns, 3, 24, 8]
        skyline = tiles.permute(1, 2, 0, 3).flatten(2)
        return torch.cat([skyline, ruler(self.prompt.columns)], dim=1)

    def render(self, frames: int) -> Tensor:
        """What the camera sees, float32 ``[frames, 3, 32, 32]`` in [0, 1]."""
        windows = self.strip().unfold(2, SCREEN, COLUMN).permute(2, 0, 1, 3)
        return windows[self.positions(frames) * self.prompt.stride].contiguous()

    def visible_codes(self, frames: int) -> Tensor:
        """Code of each column on screen, int64 ``[frames, 4]``."""
        return self.codes.unfold(0, VISIBLE, 1)[self.positions(frames) * self.prompt.stride]


def poses(positions: Tensor) -> Tensor:
    """Camera-to-world matrices ``[F, 4, 4]`` of positions ``[F]``: it moves, and never turns."""
    pose = torch.eye(4).repeat(len(positions), 1, 1)
    pose[:, 0, 3] = positions.float().cpu()
    return pose


def bounce(step: Tensor, size: int) -> Tensor:
    """Position on a line of ``size`` places after ``step`` moves; an end is shown once."""
    turn = size - 1
    return turn - (step % (2 * turn) - turn).abs()


def draw_world(prompt: PanoramaPrompt, generator: torch.Generator) -> World:
    """Draw a world for a prompt; the same generator state gives the same world."""
    inner = prompt.columns - 2
    fresh = torch.randint(0, LEFT_WALL, (inner,), generator=generator)
    repeats = torch.rand(inner, generator=generator) < REPEAT
    repeats[0] = False
    source = torch.where(repeats, 0, torch.arange(inner)).cummax(0).values
    codes = torch.cat([torch.tensor([LEFT_WALL]), fresh[source], torch.tensor([RIGHT_WALL])])
    phase = int(torch.randint(0, prompt.period, (), generator=generator))
    return World(prompt, codes, 0 if prompt.start == "left" else phase)


def world_for(prompt_text: str, world_seed: int) -> World:
    """Draw the one world that belongs to a prompt and a seed.

    Args:
        prompt_text: Four words, such as ``"dusk fast n13 left"``.
        world_seed: Any 64-bit integer; the stream of prompts carries one per prompt.

    Raises:
        ValueError: The prompt is not one of the panorama world.

    >>> world = world_for("dusk fast n13 left", world_seed=7)
    >>> world.prompt.period, tuple(world.codes.shape), world.phase
    (24, (28,), 0)
    >>> bool((world.codes == world_for("dusk fast n13 left", world_seed=7).codes).all())
    True
    """
    generator = torch.Generator().manual_seed(world_seed)
    return draw_world(PanoramaPrompt.parse(prompt_text), generator)


def draw_prompt(
    generator: torch.Generator, sizes: tuple[int, int], slow: float = 0.4, left: float = 0.5
) -> PanoramaPrompt:
    """Draw a prompt with n between ``sizes`` (both included); ``slow``, ``left`` are chances."""
    palette = int(torch.randint(len(PALETTES), (), generator=generator))
    size = int(torch.randint(sizes[0], sizes[1] + 1, (), generator=generator))
    pace, side = torch.rand(2, generator=generator).tolist()
    return PanoramaPrompt(
        tuple(PALETTES)[palette],
        "slow" if pace < slow else "fast",
        size,
        "left" if side < left else "any",
    )


def column_tiles(palette: str) -> Tensor:
    """The skyline part of every column code, float32 ``[26, 3, 24, 8]`` in [0, 1]."""
    sky, *colours = (torch.tensor(rgb) for rgb in PALETTES[palette])
    tiles = sky.view(1, 3, 1, 1).repeat(CODES, 1, SKYLINE, COLUMN)
    rows = torch.arange(SKYLINE)
    for colour, paint in enumerate(colours):
        for level, height in enumerate(HEIGHTS):
            tile = tiles[colour * len(HEIGHTS) + level]
            tile[:, rows >= SKYLINE - height] = paint.view(3, 1, 1)
            for top in range(SKYLINE - height + 1, SKYLINE - 2, 4):
                for left in (1, 5):
                    tile[:, top : top + 2, left : left + 2] = 0.55 * paint.view(3, 1, 1)
    stripes = ((rows // 4) % 2).float().view(1, SKYLINE, 1).expand(3, SKYLINE, COLUMN)
    tiles[LEFT_WALL], tiles[RIGHT_WALL] = stripes, 1.0 - stripes
    return tiles


def ruler_code(x: Tensor) -> Tensor:
    """Six numbers in [-1, 1] that say where pixel column ``x`` is, ``[..., 6]``."""
    waves = [2 * math.pi * x / period for period in RULER_PERIODS]
    return torch.stack([wave for angle in waves for wave in (angle.cos(), angle.sin())], dim=-1)


def ruler(columns: int) -> Tensor:
    """The lowest 8 pixel rows, the same in all worlds, float32 ``[3, 8, 8 * columns]``."""
    x = torch.arange(0, COLUMN * columns, 4, dtype=torch.float32)
    colours = (ruler_code(x) * 0.45 + 0.5).view(-1, 2, 3)  # [cells, half, RGB]
    return colours.permute(2, 1, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)


def phrase_table() -> dict[str, list[float]]:
    """State of every word for the model's text encoder, and of every 'speed size' pair.

    A word is a one-hot vector; a size that follows a speed also carries the ruler code of the
    camera's last position, as a contextual text encoder would make it.
    """
    table = {
        word: [float(word == other) for other in VOCABULARY] + [0.0] * 6 for word in VOCABULARY
    }
    for speed, stride in SPEEDS.items():
        for size in SIZES:
            last = torch.tensor(float(COLUMN * stride * (size - 1)))
            word = f"n{size}"
            table[f"{speed} {word}"] = table[word][:-6] + ruler_code(last).tolist()
    return table
