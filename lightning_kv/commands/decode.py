"""`lightning-kv decode`: videos from latents that a rollout left on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell


@dataclass(frozen=True)
class DecodeOptions:
    """Videos from latents that a rollout left on disk.

    Args:
        source: A file of latents, or a run directory.
        out: The video, or a folder for those of a run (beside the latents).
        vae: The vae/ folder of Wan2.1 (the fetched one).
        precision: Of the VAE (that of the rollout).
        force: Replace videos that are there.
        accelerator: cpu, gpu, or auto: a CUDA GPU if there is one.
    """

    source: Path
    out: Path | None = None
    vae: Path | None = None
    precision: str | None = None
    force: bool = False
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


def run(options: DecodeOptions) -> None:
    """Decode them."""
    from lightning_kv.tasks.decode import decode
    from lightning_kv.tasks.trainer import device_of

    device = device_of(options.accelerator)
    given = (options.source, options.out, options.vae, device, options.precision, options.force)
    tell(decode(*given).words)


COMMAND = Command(
    "decode",
    DecodeOptions,
    run,
    """\
examples:
  lightning-kv decode clip.safetensors -o clip.mp4
  lightning-kv decode runs/longlive --vae models/wan2.1/vae

A run that kept its latents (evaluate --latents true) goes on with the clips that have no video.""",
    positional={"source": "SOURCE"},
    metavars={"vae": "FOLDER"},
)
