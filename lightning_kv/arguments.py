"""What people type, read into settings; what is wrong with it, said in words."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

EXAMPLES = {
    "check": """\
Paired by prompt. Exit code 0: not worse by more than the margin, with the confidence of --level;
1: worse by more than that; 2: too few prompts to say (it says how many more would do), or an error.

examples:
  lightning-kv check runs/now --baseline baseline/summary.json --margin psnr=0.5,recall=0.02
  lightning-kv check runs/now --baseline runs/before --policies [top-attention@9f]""",
    "compare": """\
Videos are paired by file name. A comparison goes on in its directory where it was left. What can
not be read is skipped, said, and gives exit code 1.

examples:
  lightning-kv compare full/ mine/ theirs/ --out runs/compared
  lightning-kv compare --pairs pairs.csv --out runs/compared --length shortest
  lightning-kv compare real/ mine/ --unpaired --metrics [fvd/i3d,kvd/i3d] --out runs/sets""",
    "convert": """\
examples:
  lightning-kv convert self_forcing_dmd.pt -o self-forcing-diffusers --to diffusers
  lightning-kv convert base.pt --lora lora.pt -o longlive.safetensors --to original""",
    "decode": """\
examples:
  lightning-kv decode clip.safetensors -o clip.mp4
  lightning-kv decode runs/longlive --vae models/wan2.1/vae

A run that kept its latents (evaluate --latents true) goes on with the clips that have no video.""",
    "doctor": """\
examples:
  lightning-kv doctor
  lightning-kv doctor --json""",
    "encode": """\
The text encoder of Wan has 5.7 billion parameters. With the text states of a set on disk, rollouts
need none: the folder is prompts (--data.shards) and text (--text) of every later run.

examples:
  lightning-kv encode prompts.txt --out data/mine
  lightning-kv encode data/mine --text models/wan2.1 --negative "blurred, overexposed" """,
    "fetch": """\
Files go to $LIGHTNING_KV_MODELS, or ~/.cache/lightning_kv. Nothing else ever uses the network.

examples:
  lightning-kv fetch wan2.1-parts
  lightning-kv fetch self-forcing
  lightning-kv fetch dino-vitb16               weights of a metric, see `lightning-kv list metrics`
  lightning-kv fetch musiq-spaq --accept_license CC-BY-NC-SA-4.0""",
    "export": """\
The run must have kept its latents: evaluate --latents true.

example:
  lightning-kv export runs/longlive -o vbench""",
    "evaluate": """\
What is not given is the model's own; see `lightning-kv list policies`, `list parts`. For example:
  lightning-kv evaluate -c configs/evaluate.yaml --budgets 6f,9f,15f --trainer.devices 2
  lightning-kv evaluate --policies [full,mine.yaml@9f,my_pkg.mine:Part@9f] --out runs/mine""",
    "generate": """\
examples:
  lightning-kv generate "dusk fast n13 left" -o dusk.mp4
  lightning-kv generate "dusk fast n13 left" --policy sink-window@9f --seconds 9 -o window.mp4
  lightning-kv generate "noon fast n10 left" --prompt "night fast n10 left@3" -o evening.mp4
  lightning-kv generate "A red fox runs through snow" --model self-forcing -o fox.mp4
  lightning-kv generate "A red fox" --model longlive=base.pt+lora.pt --seconds 30 -o fox.safetensors

A prompt of the panorama model is four words: colours (dusk, noon, night, mist), speed (slow, fast),
camera positions (n4 to n14) and start (left, any).""",
    "inspect": """\
example:
  lightning-kv inspect runs/quickstart""",
    "list": """\
examples:
  lightning-kv list policies
  lightning-kv list models
  lightning-kv list metrics
  lightning-kv list parts window importance    the meaning of each setting
  lightning-kv list parts --json""",
    "pretrain-encoder": """\
example:
  lightning-kv pretrain-encoder -c configs/pretrain_encoder.yaml""",
    "pretrain": """\
example:
  lightning-kv pretrain -c configs/pretrain_panorama.yaml --out runs/pretrain_panorama""",
    "recommend": """\
A policy qualifies where it fits into the memory, no clip failed under it, it saves memory or reads,
and its mean loss against the reference, prompt by prompt, is within every margin with 95 %
confidence: by the BCa bootstrap over prompts, never more than 1 - 0.5^n for n prompts (fewer than 5
recommend nothing), and corrected for the number of policies and metrics (Holm). Of those that
qualify, the one with the fewest bytes wins, then the one with the fewest reads (to 1 % of the
reference).

A margin is how much worse than the reference a metric may be, in its own unit. ssim and latent_mse
are losses from 1 and 0, what two equal clips have; psnr has no such value and takes no margin.
Without --margin it is the first of recall=0.02, revisit_error=0.002, ssim=0.02 that the run has.

examples:
  lightning-kv recommend runs/quickstart
  lightning-kv recommend runs/quickstart --memory 2MiB --margin recall=0.05,ssim=0.1
  lightning-kv recommend runs/quickstart --json""",
    "report": """\
One run's page is report.html in its directory and is written anew; several runs need --out.

examples:
  lightning-kv report runs/quickstart
  lightning-kv report runs/quickstart runs/evaluate --out both.html""",
}
"""The end of each command's ``--help``."""


def parse(command: str, options: type, words: list[str]) -> Any:
    """Read a command's settings from YAML files (``-c``) and flags; flags win.

    Raises:
        ValueError: A word that is no setting, or a value that does not fit.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"lightning-kv {command}",
        description=options.__doc__.partition("Args:")[0].strip(),
        usage=f"lightning-kv {command} -c FILE [--SETTING VALUE ...]",
        epilog=EXAMPLES[command],
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file; may be repeated")
    parser.add_class_arguments(options, as_group=False)
    try:
        found = parser.parse_args(words)
        made = parser.instantiate(found)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), setting_names(options))) from None
    return options(**{field.name: made[field.name] for field in dataclasses.fields(options)})


def explain(text: str, known: Iterable[str]) -> str:
    """An error of a parser, with the nearest known setting where a name is unknown."""
    given = re.search(r"(?:[Uu]nrecognized arguments: --|[Oo]ption ')([\w.\-]+)", text)
    if given and given[1] not in known:
        return f"No setting {given[1]!r}.{hint(given[1], known)} Settings: {', '.join(known)}."
    return text


def setting_names(options: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    import typing

    hints = typing.get_type_hints(options)
    names = []
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += setting_names(kind, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def hint(given: str, known: Iterable[str]) -> str:
    """The nearest known name, as a question; nothing where none is near."""
    near = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Words(argparse.ArgumentParser):
    """A parser for commands without settings files; it says errors as the others do.

    Args:
        command: Its name.
        about: What it does, in a sentence.
    """

    def __init__(self, command: str, about: str) -> None:
        super().__init__(
            f"lightning-kv {command}",
            description=about,
            epilog=EXAMPLES[command],
            formatter_class=Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Said by the caller, with the nearest known setting."""
        known = [n[2:] for n in self._option_string_actions if n.startswith("--") and n != "--help"]
        usage = " ".join(self.format_usage().split())
        said = explain(message, known)
        raise ValueError(said if said != message else f"{message}. {usage}")


class Help(argparse.RawDescriptionHelpFormatter):
    """Names beside their meaning, in at most 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)
