"""`lightning-kv pretrain-encoder`: train the encoder that panorama clips are compared with."""

from __future__ import annotations

import sys

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import quiet
from lightning_kv.tasks.options import PretrainEncoderOptions


def run(options: PretrainEncoderOptions) -> None:
    """Train, and say where the weights are."""
    from lightning_kv.tasks.pretrain_encoder import pretrain_encoder

    quiet()
    sys.stdout.write(f"Weights are in {pretrain_encoder(options)}\n")


COMMAND = Command(
    "pretrain-encoder",
    PretrainEncoderOptions,
    run,
    """\
example:
  lightning-kv pretrain-encoder -c configs/pretrain_encoder.yaml""",
)
