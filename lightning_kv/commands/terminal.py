"""How commands speak: what is said, what is left out, and how a command fails."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def fail(text: str) -> None:
    """Say what is wrong and stop."""
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)


def console() -> Console:
    """Standard output, 120 columns wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def say(out: Any, sentences: Sequence[str]) -> None:
    """Sentences as a list, the first one bold."""
    from rich.text import Text

    for index, sentence in enumerate(sentences):
        out.print(Text(sentence, "" if index else "bold"))
    out.print()


def tell(sentences: Sequence[str]) -> None:
    """Plain lines."""
    sys.stdout.write("\n".join(sentences) + "\n")


def quiet() -> None:
    """Keep Lightning's start-up notes to what a user must know."""
    import lightning.pytorch  # noqa: F401  its import sets the levels, so it comes first

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "does not have many workers",  # worlds are drawn in no time
        "isinstance.treespec, LeafSpec",  # between lightning and torch
        "srun. command is available",
        "Checkpoint directory .* exists and is not empty",  # that is how a run goes on
        "was called before the ``update`` method",  # the reference has nothing to be compared with
        "to accumulate the metric across",  # a fit is one process, while other ranks wait
        "no pre-optimization state was saved",  # the state after the step is the one wanted
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
