"""`lightning-kv pretrain`: train the embedded panorama model."""

from __future__ import annotations

import sys

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import quiet
from lightning_kv.tasks.options import PretrainOptions


def run(options: PretrainOptions) -> None:
    """Train, and say where the weights are."""
    from lightning_kv.tasks.pretrain import pretrain

    quiet()
    sys.stdout.write(f"Weights are in {pretrain(options)}\n")


COMMAND = Command(
    "pretrain",
    PretrainOptions,
    run,
    """\
example:
  lightning-kv pretrain -c configs/pretrain_panorama.yaml --out runs/pretrain_panorama""",
)
