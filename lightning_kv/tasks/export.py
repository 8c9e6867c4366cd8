"""Videos of a run under the folders and names that VBench reads.

VBench (arXiv 2311.17982) takes one folder per method, with files ``PROMPT-0.mp4``, ``PROMPT-1.mp4``
for several samples of a prompt. Beside each folder stands ``METHOD.json``, which maps every file to
its prompt: what its ``--mode custom_input --prompt_file`` wants, and what is exact where a prompt
makes no file name.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lightning_kv.tasks.decode import decode_all, latents_of
from lightning_kv.utilities.files import write_atomic
from lightning_kv.utilities.formatting import several

LONGEST = 180  # characters of a prompt in a file name, whose length every system limits


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Args:
        folders: One per policy.
        videos: How many were written.
        kept: How many were there already.
    """

    folders: tuple[Path, ...]
    videos: int
    kept: int

    @property
    def words(self) -> list[str]:
        """What was done, and what to type next."""
        there = f" {self.kept} were there already." if self.kept else ""
        first = self.folders[0]
        return [
            f"{several(self.videos, 'video')} written to "
            f"{', '.join(map(str, self.folders))}.{there}",
            f"VBench: vbench evaluate --videos_path {first} --mode custom_input "
            f"--prompt_file {first}.json --dimension subject_consistency",
        ]


def export(
    run: Path,
    out: Path,
    vae: Path | None = None,
    device: str | torch.device = "cpu",
    precision: str | None = None,
    force: bool = False,
) -> Exported:
    """Decode the latents of a run into VBench's folders; what is there already stays.

    Args:
        run: A run directory that was made with ``--latents true``.
        out: Gets a folder for each policy.
        vae: As in :func:`lightning_kv.tasks.decode.decode`.
        device: As there.
        precision: As there.
        force: Write videos again that are there.

    Raises:
        ValueError: There are no latents, or they cannot be decoded.
    """
    prompts: dict[Path, dict[str, str]] = defaultdict(dict)
    pairs = []
    count: Counter[tuple[Path, str]] = Counter()
    for clip in latents_of(run):
        folder, prompt = out / clip.parent.name, prompt_of(clip)
        name = file_name(prompt)
        video = folder / f"{name}-{count[folder, name]}.mp4"
        count[folder, name] += 1
        prompts[folder][str(video)] = prompt
        pairs.append((clip, video))
    left = [(clip, video) for clip, video in pairs if force or not video.is_file()]
    decode_all(left, vae, device, precision)
    for folder, known in prompts.items():
        write_atomic(folder.parent / f"{folder.name}.json", json.dumps(known, indent=1) + "\n")
    return Exported(tuple(prompts), len(left), len(pairs) - len(left))


def file_name(prompt: str) -> str:
    """A prompt as part of a file name.

    >>> file_name("A cat/dog  at night")
    'A cat dog at night'
    """
    return re.sub(r"[\s/\\\0]+", " ", prompt).strip()[:LONGEST].strip() or "untitled"


def prompt_of(clip: Path) -> str:
    """The prompt of a file of latents, from its head alone.

    Raises:
        ValueError: It does not say.
    """
    try:
        with safe_open(clip, "pt") as file:
            return str(json.loads(file.metadata()["about"])["prompt"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{clip} does not say its prompt ({type(error).__name__}: {error}). Remove it, and "
            "take its run up again."
        ) from error
