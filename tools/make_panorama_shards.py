"""Write the committed panorama prompt sets again, byte for byte.

Usage::

    python tools/make_panorama_shards.py [--out data]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_kv.data.panorama import PALETTES, PanoramaPrompt
from lightning_kv.data.shards import write_prompt_shards

Kind = tuple[str, int, str]
"""Speed (``slow`` or ``fast``), camera positions, start (``left`` or ``any``)."""

SETS: dict[str, tuple[int, tuple[Kind, ...]]] = {
    "panorama-fast13": (64, (("fast", 13, "left"),)),
    "panorama-fast13-any": (32, (("fast", 13, "any"),)),
    "panorama-quick": (32, (("fast", 10, "left"),)),
    "panorama-slow12": (32, (("slow", 12, "left"),)),
    "panorama-mixed": (
        96,
        (
            ("fast", 13, "any"),  # every other one
            ("fast", 13, "left"),
            ("fast", 13, "any"),
            ("slow", 12, "left"),
            ("fast", 13, "any"),
            ("fast", 13, "left"),
            ("fast", 13, "any"),
            ("fast", 10, "left"),
        ),
    ),
}
"""Prompts, and the kinds that take turns."""
PER_SHARD = 32


def panorama_samples(
    name: str, count: int, kinds: Sequence[Kind]
) -> list[tuple[str, dict[str, str]]]:
    """Keys and records of a set.

    Palettes take turns, and so do kinds, so a run that is cut to a multiple of 4 prompts has as
    many of each palette, and one that is cut to whole turns of the kinds their shares; of several
    kinds each meets each palette.

    Args:
        name: Name of the set; part of every key, so that two sets never share a world.
        count: Prompts.
        kinds: One, or a multiple of the number of palettes.
    """
    found, palettes = [], list(PALETTES)
    for number in range(count):
        turn = number + (number // len(kinds) if len(kinds) > 1 else 0)
        prompt = PanoramaPrompt(palettes[turn % len(palettes)], *kinds[number % len(kinds)])
        found.append((f"{name}-{number:04d}", {"prompt": prompt.text, "source": "panorama"}))
    return found


def make(out: Path) -> None:
    """Write all sets, each into its own folder under ``out``."""
    for name, (count, kinds) in SETS.items():
        write_prompt_shards(panorama_samples(name, count, kinds), out / name, name, PER_SHARD)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the committed panorama prompt sets again.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "data",
        help="folder for the sets (default: the repository's data folder)",
    )
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
