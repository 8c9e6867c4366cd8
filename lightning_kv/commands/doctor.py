"""`lightning-kv doctor`: what works here."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console


@dataclass(frozen=True)
class DoctorOptions:
    """What works here: packages, devices, attention kernels, weights.

    Args:
        json: For programs.
    """

    json: bool = False


def run(options: DoctorOptions) -> int | None:
    """Look, and say; exit code 1 where something needed does not work."""
    from lightning_kv.tasks.doctor import doctor, render

    found = doctor()
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
    else:
        console().print(render(found))
    return None if found.healthy else 1


COMMAND = Command(
    "doctor",
    DoctorOptions,
    run,
    """\
examples:
  lightning-kv doctor
  lightning-kv doctor --json""",
)
