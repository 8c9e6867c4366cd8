"""`lightning-kv generate`: one video from a prompt, and what its cache cost."""

from __future__ import annotations

from dataclasses import replace

from lightning_kv.assets import file_of
from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell
from lightning_kv.tasks.options import GenerateOptions


def run(options: GenerateOptions) -> None:
    """Make it, and say what it cost."""
    from lightning_kv.tasks.generate import generate

    made = generate(replace(options, policy=file_of(options.policy)))
    tell((*made.words, *made.notes))


COMMAND = Command(
    "generate",
    GenerateOptions,
    run,
    """\
examples:
  lightning-kv generate "dusk fast n13 left" -o dusk.mp4
  lightning-kv generate "dusk fast n13 left" --policy sink-window@9f --seconds 9 -o window.mp4
  lightning-kv generate "noon fast n10 left" --prompt "night fast n10 left@3" -o evening.mp4
  lightning-kv generate "A red fox runs through snow" --model self-forcing -o fox.mp4
  lightning-kv generate "A red fox" --model longlive=base.pt+lora.pt --seconds 30 -o fox.safetensors

A prompt of the panorama model is four words: colours (dusk, noon, night, mist), speed (slow, fast),
camera positions (n4 to n14) and start (left, any).""",
    positional={"prompt": "PROMPT"},
    metavars={"out": "FILE", "switches": "TEXT@SECONDS", "size": "HxW", "negative": "TEXT"},
    repeated={"switches": "prompt"},
)
