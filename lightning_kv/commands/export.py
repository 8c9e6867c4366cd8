"""`lightning-kv export`: videos of a run under the folders and names that VBench reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell


@dataclass(frozen=True)
class ExportOptions:
    """Videos of a run under the folders and names that VBench reads.

    Args:
        run: Run directory that was made with --latents.
        out: Gets a folder for each policy.
        vae: The vae/ folder of Wan2.1 (the fetched one).
        precision: Of the VAE (that of the rollout).
        force: Write videos again that are there.
        accelerator: cpu, gpu, or auto: a CUDA GPU if there is one.
    """

    run: Path
    out: Path
    vae: Path | None = None
    precision: str | None = None
    force: bool = False
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


def run(options: ExportOptions) -> None:
    """Write them."""
    from lightning_kv.tasks.export import export
    from lightning_kv.tasks.trainer import device_of

    device = device_of(options.accelerator)
    given = (options.run, options.out, options.vae, device, options.precision, options.force)
    tell(export(*given).words)


COMMAND = Command(
    "export",
    ExportOptions,
    run,
    """\
The run must have kept its latents: evaluate --latents true.

example:
  lightning-kv export runs/longlive -o vbench""",
    positional={"run": "RUN"},
    metavars={"out": "FOLDER", "vae": "FOLDER"},
)
