"""The network of LPIPS, with a trunk from elsewhere: nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_kv.metrics.backbones.base import Frozen, in_float32
from lightning_kv.metrics.backbones.i3d import load_exactly
from lightning_kv.metrics.backbones.weights import (
    WeightsUnavailable,
    load_state,
    locate,
    published,
    verified,
)
from lightning_kv.metrics.base import BLOCK

TRUNKS = {
    "alex": ("alexnet", "alexnet"),
    "vgg": ("vgg16", "vgg16"),
    "squeeze": ("squeezenet", "squeezenet1_1"),
}
"""Name of the published weights, and torchvision's name, of each trunk."""

_built: WeakValueDictionary[tuple[str, Path], LPIPSNetwork] = WeakValueDictionary()


class LPIPSNetwork(Frozen):
    """The network of the package ``lpips``, version 0.1, with a trunk from elsewhere.

    That package downloads the trunk when asked for a trained one; here nothing is downloaded. Its
    trained 1x1 weights ship with it.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``.
        trunk: torchvision's network of that kind; a copy of its features is used. None for random
            ones with a fixed seed: for tests of plumbing, and for nothing else.
        sha256: Checksum of the file that the trunk was read from, where it is the published one.

    Raises:
        ValueError: There is no such net, or the trunk is another network.
        WeightsUnavailable: The package is missing.

    Attributes:
        name: In results, after ``lpips/``.
        recipe: What it computes, in a sentence.
        comparable: Whether numbers may be compared with those of the literature.
        weights_sha256: Checksum of the trunk's file; None where there is none.
    """

    def __init__(
        self, net: str = "alex", trunk: nn.Module | None = None, sha256: str | None = None
    ) -> None:
        super().__init__()
        self.net = _lpips(net)
        published_trunk = f"{TRUNKS[net][1]} of torchvision"
        if trunk is None:
            self.name, origin = f"{net}-random", f"UNTRAINED {published_trunk}, seed 0"
        else:
            _copy_features(trunk, self.net.net)
            self.name = net if sha256 else f"{net}-{type(trunk).__name__.lower()}"
            origin = published_trunk if sha256 else f"{type(trunk).__name__} given by the user"
        self.recipe = (
            f"LPIPS 0.1 of the package lpips, trunk {origin}, its trained 1x1 weights, inputs in "
            "[-1,1], spatial mean, sum over layers, float32"
        )
        self.comparable, self.weights_sha256 = sha256 is not None, sha256
        self.requires_grad_(False)
        self.train(False)

    @torch.no_grad()
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Distance of every frame.

        Args:
            preds: ``[F, 3, H, W]`` in [0, 1].
            target: The same shape and range.

        Returns:
            float64 ``[F]``.
        """
        found = [
            self.net(2 * a.float() - 1, 2 * b.float() - 1).flatten()
            for a, b in zip(preds.split(BLOCK), target.split(BLOCK), strict=True)
        ]
        return torch.cat(found).double()


def network(
    net: str, given: Path | str | None = None, accept: Collection[str] = ()
) -> LPIPSNetwork:
    """The network with the published trunk; while one is in use, asking again gives the same one.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``.
        given: File of the trunk; looked for if None.
        accept: Licences accepted.

    Raises:
        ValueError: There is no such net, or the file is another one.
        WeightsUnavailable: The file or a package is missing.
    """
    _check_net(net)
    name = TRUNKS[net][0]
    path = locate(name, given, accept).absolute()
    if (found := _built.get((net, path))) is None:
        sha256 = verified(path, published(name))
        trunk = torchvision_trunk(net)
        load_exactly(trunk, load_state(path), path)
        found = _built[net, path] = LPIPSNetwork(net, trunk, sha256)
    return found


def torchvision_trunk(net: str) -> nn.Module:
    """Network of torchvision of this kind, untrained; the state of random numbers stays as it is.

    Raises:
        ValueError: There is no such net.
        WeightsUnavailable: The package is missing.
    """
    _check_net(net)
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise _missing("torchvision") from error
    with torch.random.fork_rng(devices=[]), in_float32():
        return getattr(models, TRUNKS[net][1])(weights=None).eval()


def _lpips(net: str) -> nn.Module:
    """The package's network: its trained 1x1 weights on random features, always the same.

    Raises:
        ValueError: There is no such net.
        WeightsUnavailable: The package is missing.
    """
    _check_net(net)
    try:
        from lpips import LPIPS as Network
    except ModuleNotFoundError as error:
        raise _missing("lpips") from error
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), in_float32():
        warnings.filterwarnings("ignore", module="torchvision")  # it uses an old argument
        torch.random.default_generator.manual_seed(0)  # and no other device's
        return Network(net=net, version="0.1", pnet_rand=True, verbose=False)


def _copy_features(trunk: nn.Module, slices: nn.Module) -> None:
    """Copy the features of torchvision's network into those of the package, which cuts them up.

    Raises:
        ValueError: The trunk is another network.
    """
    held = {
        name.removeprefix("features."): value
        for name, value in trunk.state_dict().items()
        if name.startswith("features.")
    }
    # What is "slice2.3.weight" there is "features.3.weight" here.
    names = {name.partition(".")[2]: name for name in slices.state_dict()}
    wanted = {name.partition(".")[2]: value.shape for name, value in slices.state_dict().items()}
    shapes = {name: value.shape for name, value in held.items()}
    if shapes != wanted:
        raise ValueError(
            f"{type(trunk).__name__} is not the trunk of this LPIPS: of the {len(wanted)} "
            f"parameters that it needs, {len(wanted.items() & shapes.items())} fit, and "
            f"{len(shapes.keys() - wanted.keys())} are left over. Pass torchvision's network of "
            "the same name, with its features under that name."
        )
    slices.load_state_dict({names[name]: value for name, value in held.items()})


def _check_net(net: str) -> None:
    if net not in TRUNKS:
        raise ValueError(f"There is no LPIPS '{net}'. Choose one of {', '.join(TRUNKS)}.")


def _missing(package: str) -> WeightsUnavailable:
    return WeightsUnavailable(
        f"LPIPS cannot be built: it needs the package {package}, which is not installed. "
        f"Install it with `pip install {package}`, or leave the metric out."
    )
