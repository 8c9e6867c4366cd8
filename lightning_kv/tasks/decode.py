"""Pixels of latents that a rollout has left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_kv.models.embedded import load_embedded
from lightning_kv.models.loading import vae_source
from lightning_kv.models.precision import known_profile
from lightning_kv.models.sources import find_model
from lightning_kv.models.video import Codec
from lightning_kv.runs.video import write_mp4
from lightning_kv.tasks.progress import ProgressLine
from lightning_kv.tasks.rollouts.latent_files import SUFFIX, read_latents
from lightning_kv.tasks.videos import enlarged
from lightning_kv.utilities.formatting import several

FOLDER = "latents"
"""Where a run keeps the latents of its clips."""


@dataclass(frozen=True)
class Decoded:
    """What was decoded.

    Args:
        videos: Files that were written now.
        kept: Files that were there already.
        out: The video, or the folder of them.
    """

    videos: tuple[Path, ...]
    kept: int
    out: Path

    @property
    def words(self) -> list[str]:
        """What was done, in a sentence."""
        there = f" {self.kept} were there already." if self.kept else ""
        return [f"{several(len(self.videos), 'video')} written to {self.out}.{there}"]


def decode(
    source: Path,
    out: Path | None = None,
    vae: Path | None = None,
    device: str | torch.device = "cpu",
    precision: str | None = None,
    force: bool = False,
) -> Decoded:
    """Write a video for each clip of latents, one latent frame in memory at a time.

    Args:
        source: A file of latents, or a run directory that was made with ``--latents true``.
        out: The video, or the folder of a run's videos; beside the latents where not given.
        vae: Folder of the VAE; that of the clip's model where not given.
        device: Where the VAE runs.
        precision: Its profile; that of the clip's rollout where not given.
        force: Replace videos that are there. Without it a run goes on with those that are not.

    Raises:
        ValueError: No latents, no VAE, or a video that would be lost.
    """
    pairs = list(_pairs(source, out))
    single = not source.is_dir()
    if single and pairs[0][1].exists() and not force:
        raise ValueError(
            f"{pairs[0][1]} exists and would be lost. Give another -o, or --force to replace it."
        )
    left = [(clip, video) for clip, video in pairs if force or not video.is_file()]
    decode_all(left, vae, device, precision, silent=single)
    target = pairs[0][1] if single else (out or source / "decoded")
    return Decoded(tuple(video for _, video in left), len(pairs) - len(left), target)


def decode_all(
    pairs: Sequence[tuple[Path, Path]],
    vae: Path | None,
    device: str | torch.device,
    precision: str | None,
    silent: bool = False,
) -> None:
    """Write the video of each file of latents; each VAE is loaded once.

    Raises:
        ValueError: Latents that cannot be read, no VAE, or no such precision.
    """
    if precision is not None:
        known_profile(precision)
    codecs: dict[str, Codec] = {}
    with ProgressLine(len(pairs), "clips", "decoding", visible=not silent) as line:
        for clip, video in pairs:
            latents, about = read_latents(clip)
            name = about["model"]
            if name not in codecs:
                codecs[name] = _codec(name, vae, device, precision or about.get("precision"))
            video.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(
                video, enlarged(codecs[name].stream(latents.float().to(device))), about["fps"]
            )
            line.advance(1)


def latents_of(run: Path) -> list[Path]:
    """Files of latents that a run has left.

    Raises:
        ValueError: There are none.
    """
    found = sorted((run / FOLDER).rglob(f"*{SUFFIX}"))
    if not found:
        raise ValueError(
            f"There are no latents at {run}. Give a file that `lightning-kv generate ... -o "
            f"clip{SUFFIX}` wrote, or a run directory of `lightning-kv evaluate --latents true`."
        )
    return found


def _pairs(source: Path, out: Path | None) -> Iterator[tuple[Path, Path]]:
    """Latents and the video of each."""
    if source.is_file():
        video = out or source.with_suffix(".mp4")
        if video.suffix.lower() != ".mp4" or not video.parent.is_dir():
            raise ValueError(
                f"{video} is no place for a video. Give a name that ends in .mp4, in a folder that "
                "is there."
            )
        yield source, video
        return
    found = latents_of(source)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, and a run has many videos. Give a folder to -o.")
    for clip in found:
        inside = clip.relative_to(source / FOLDER).with_suffix(".mp4")
        yield clip, (out or source / "decoded") / inside


def _codec(name: str, vae: Path | None, device: str | torch.device, precision: str | None) -> Codec:
    precision = precision or "reference"
    if vae is not None:
        return vae_source(vae, device, precision)
    source = find_model(name)
    if source.config is None:
        return load_embedded(source.weights, device, "float32").codec
    return vae_source(source.vae, device, precision)
