"""Networks that metrics look through, by name: one resolver, which never downloads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from pathlib import Path
from weakref import WeakValueDictionary

from torch import nn

from lightning_kv.metrics.backbones.base import Backbone, RandomBackbone, Wrapped, in_float32
from lightning_kv.metrics.backbones.weights import WEIGHTS, WeightsUnavailable, locate
from lightning_kv.utilities.nearest import unknown

__all__ = ["BACKBONES", "Backbone", "RandomBackbone", "WeightsUnavailable", "Wrapped", "backbone"]

Builder = Callable[["Path | None"], nn.Module]
"""Makes a network of the weights at a path; of None where it needs none or ships them."""

_PACKAGES = {"transformers": '"lightning_kv[wan]"', "tokenizers": '"lightning_kv[wan]"'}
"""What to install for a package that is missing, where that is not the package itself."""


def _load(path: Path | None, target: tuple[str, str]) -> nn.Module:
    """What the class ``target`` of a module of this package loads; imported only now."""
    module, kind = target
    return getattr(import_module(f"{__name__}.{module}"), kind).load(path)


def _lazy(module: str, kind: str) -> Builder:
    return partial(_load, target=(module, kind))


BACKBONES: dict[str, Builder] = {
    "dino-vitb16": _lazy("vits", "DINO"),
    "dinov2-vitb14": _lazy("vits", "DINOv2"),
    "clip-vit-b32": _lazy("vits", "CLIPB32"),
    "clip-vit-l14": _lazy("vits", "CLIPL14"),
    "panorama-encoder": _lazy("panorama_encoder", "PanoramaEncoder"),
    "i3d": _lazy("i3d", "I3DBackbone"),
    "i3d-torchscript": _lazy("i3d", "I3DScriptBackbone"),
    "raft-large": _lazy("raft", "RAFT"),
    "videomae-ssv2": _lazy("videomae", "VideoMAE"),
    "musiq-spaq": _lazy("interpolators", "MUSIQ"),
    "amt-s": _lazy("interpolators", "AMT"),
    "linear-midpoint": _lazy("interpolators", "LinearMidpoint"),
    "random-2dconv": lambda path: RandomBackbone(2),
    "random-3dconv": lambda path: RandomBackbone(3),
}
"""How each network is made, by name; its weights are those of the same name in ``WEIGHTS``."""

_built: WeakValueDictionary[tuple[str, Path | None], nn.Module] = WeakValueDictionary()


def backbone(
    name: str | Path | nn.Module, given: Path | str | None = None, accept: Collection[str] = ()
) -> nn.Module:
    """The network of this name, its weights taken from this machine.

    While a network is in use, asking again gives the same one, so metrics share it.

    Args:
        name: A name in ``BACKBONES``; ``NAME=PATH``; the path of a file or folder that has its
            published name; or a module, which is used under its own name.
        given: Where the weights lie.
        accept: Licences accepted for weights that forbid commercial use, such as
            ``CC-BY-NC-4.0``.

    Raises:
        ValueError: No such name, or a path that does not say whose weights it is.
        WeightsUnavailable: The weights, a licence or a package is missing.

    Example:
        >>> backbone("random-2dconv").comparable
        False
        >>> backbone(nn.Flatten()).name
        'flatten'
    """
    if isinstance(name, nn.Module):
        return name if isinstance(name, Backbone) else Wrapped(name)
    name, given = _parsed(name, given)
    if name in WEIGHTS:
        path = locate(name, given, accept).absolute()
    else:
        path = None if given is None else Path(given).expanduser().absolute()
    network = _built.get((name, path))
    if network is None:
        network = _built[name, path] = _build(name, path)
    return network


def _build(name: str, path: Path | None) -> nn.Module:
    """Make a network.

    Raises:
        WeightsUnavailable: A package is missing.
    """
    try:
        with in_float32():
            return BACKBONES[name](path)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __name__.partition(".")[0]:
            raise
        raise WeightsUnavailable(
            f"The backbone '{name}' cannot be built: it needs the package {missing}, which is not "
            f"installed. Install it with `pip install {_PACKAGES.get(missing, missing)}`, or leave "
            "the metric out."
        ) from error


def _parsed(name: str | Path, given: Path | str | None) -> tuple[str, Path | str | None]:
    """Name in the registry, and path, of what was written.

    Raises:
        ValueError: It is neither a name nor a path of a published name.
    """
    text = str(name)
    if text in BACKBONES:
        return text, given
    head, equals, tail = text.partition("=")
    if equals and head in BACKBONES and tail and given is None:
        return head, tail
    path = Path(text).expanduser()
    if path.exists() and given is None:
        for known in BACKBONES.keys() & WEIGHTS.keys():
            if WEIGHTS[known].file.rstrip("/") == path.resolve().name:
                return known, path
        raise ValueError(
            f"{text} does not say whose weights it is: its name is not one that was published. "
            f"Write NAME={text}, where NAME is one of {', '.join(BACKBONES)}."
        )
    raise ValueError(
        f"{unknown('backbone', text, BACKBONES)} Or give a file with the published name of one, "
        "or a module."
    )
