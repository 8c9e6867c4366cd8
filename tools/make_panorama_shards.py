"""Write the committed panorama prompt sets again, byte for byte.

Usage::

    python tools/make_panorama_shards.py [--out data]
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

from lightning_kv.data.panorama import PALETTES, PanoramaPrompt
from lightning_kv.data.shards import write_prompt_shards

# Name: prompts, speed, camera positions, start.
SETS = {
    "panorama-fast13": (64, "fast", 13, "left"),
    "panorama-fast13-any": (32, "fast", 13, "any"),
    "panorama-quick": (32, "fast", 10, "left"),
    "panorama-slow12": (32, "slow", 12, "left"),
}
PER_SHARD = 32


def panorama_samples(
    name: str, count: int, speed: str, size: int, start: str
) -> list[tuple[str, dict[str, str]]]:
    """Keys and records of a set.

    Palettes take turns, so a run that is cut to a multiple of 4 prompts stays balanced.

    Args:
        name: Name of the set; part of every key, so that two sets never share a world.
        count: Prompts.
        speed: ``slow`` or ``fast``.
        size: Camera positions.
        start: ``left`` or ``any``.
    """
    prompts = (PanoramaPrompt(palette, speed, size, start) for palette in cycle(PALETTES))
    return [
        (f"{name}-{number:04d}", {"prompt": prompt.text, "source": "panorama"})
        for number, prompt in enumerate(islice(prompts, count))
    ]


def make(out: Path) -> None:
    """Write all sets, each into its own folder under ``out``."""
    for name, (count, *look) in SETS.items():
        write_prompt_shards(panorama_samples(name, count, *look), out / name, name, PER_SHARD)


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
