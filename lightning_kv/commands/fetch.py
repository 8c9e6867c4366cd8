"""`lightning-kv fetch`: download a published checkpoint, or the weights of a metric."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell


@dataclass(frozen=True)
class FetchOptions:
    """Download a published checkpoint, or the weights of a metric.

    Args:
        name: As `lightning-kv list models` and `list metrics` call it.
        force: Download again what is there.
        accept_license: Agree to that of non-commercial weights, such as cc-by-nc-4.0.
    """

    name: str
    force: bool = False
    accept_license: list[str] = field(default_factory=list)


def run(options: FetchOptions) -> None:
    """Download, after saying whose it is."""
    from lightning_kv.tasks.fetch import fetch, terms

    tell([terms(options.name)])
    tell(fetch(options.name, options.accept_license, options.force))


COMMAND = Command(
    "fetch",
    FetchOptions,
    run,
    """\
Files go to $LIGHTNING_KV_MODELS, or ~/.cache/lightning_kv. Nothing else ever uses the network.

examples:
  lightning-kv fetch wan2.1-parts
  lightning-kv fetch self-forcing
  lightning-kv fetch dino-vitb16               weights of a metric, see `lightning-kv list metrics`
  lightning-kv fetch musiq-spaq --accept_license CC-BY-NC-SA-4.0""",
    positional={"name": "NAME"},
    metavars={"accept_license": "ID,..."},
)
