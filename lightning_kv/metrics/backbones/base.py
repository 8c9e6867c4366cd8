"""What turns frames or clips into features."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 2  # blocks whose features are remembered: one of a clip and one of its reference


def same_kind(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``_apply`` does to a tensor without its change of dtype: to another device alone.

    Args:
        change: What ``to``, ``half``, ``type`` and the like do to every tensor of a module.

    Example:
        >>> same_kind(Tensor.half)(torch.ones(1)).dtype
        torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        found = change(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


@contextmanager
def in_float32() -> Iterator[None]:
    """Build networks in float32, also inside a Trainer that builds modules in its own precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Frozen(nn.Module):
    """A network that nobody trains, and whose numbers do not depend on who holds it.

    It is always in evaluation mode and shared by its copies. Its weights change their device and
    never their dtype, whatever a Trainer's ``precision``, ``half()`` or ``set_dtype`` asks of a
    module that holds it; autocast does not reach it; and what it is shown is brought to the dtype
    of its weights, or to float32 where it has none.

    Example:
        >>> network = Frozen()
        >>> network.layer = nn.Linear(2, 1)
        >>> network.half().layer.weight.dtype
        torch.float32
    """

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def __deepcopy__(self, memo: object) -> Frozen:
        return self  # it is frozen, so what is copied may share it

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Frozen:
        return super()._apply(same_kind(fn), *args, **kwargs)

    def __call__(self, *shown: Any, **kwargs: Any) -> Any:
        """What ``forward`` says, see :func:`ask`."""
        return ask(self, super().__call__, *shown, **kwargs)


def ask(network: nn.Module, call: Callable[..., Any], *shown: Any, **kwargs: Any) -> Any:
    """What a network says in the precision of its weights, whatever that of the caller is.

    Args:
        network: Whose weights say the dtype; float32 where it has none.
        call: The network itself, or a method of it.
        shown: Taken by ``call``; tensors of floating point numbers are brought to that dtype.
        kwargs: Taken by ``call`` as they are.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> ask(layer, layer, torch.ones(1, 2, dtype=torch.float64)).dtype
        torch.float32
    """
    weights = chain(network.parameters(), network.buffers())
    weight = next((x for x in weights if x.is_floating_point()), None)
    kind = torch.float32 if weight is None else weight.dtype
    tensors = [x for x in (weight, *shown) if isinstance(x, Tensor)]
    shown = tuple(
        x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() else x for x in shown
    )
    with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
        return call(*shown, **kwargs)


class Backbone(Frozen):
    """A frozen network that turns frames, or clips, into features.

    A frame backbone maps ``[N, 3, H, W]`` in [0, 1] to ``[N, d]``; a clip backbone maps
    ``[B, T, 3, H, W]`` in [0, 1] to ``[B, d]`` and says its T in ``clip_len``. It has no gradients,
    and is asked in the precision of its weights, see :class:`Frozen`. A subclass writes ``forward``
    and calls :meth:`freeze` at the end of its ``__init__``; one that is found by name also writes
    :meth:`load`; one that takes both frames and clips tells them by their dimensions and sets
    ``takes_frames = True``.

    Attributes:
        name: What it is called in results.
        num_features: Width d of the features.
        recipe: Weights and preprocessing, in a sentence.
        comparable: Whether numbers may be compared with those of the literature.
        weights_sha256: Checksum of the weights file; None where there is none.
        clip_len: Frames of the clips it takes; None where it takes frames.

    Example:
        >>> class Colour(Backbone):
        ...     name, num_features, recipe = "colour", 3, "mean colour"
        ...
        ...     def forward(self, frames):
        ...         return frames.mean((2, 3))
        >>> Colour().train().features(torch.full((2, 3, 4, 4), 0.5)).shape
        torch.Size([2, 3])
    """

    name: str
    num_features: int
    recipe: str
    comparable: bool = False
    weights_sha256: str | None = None
    clip_len: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._shown: deque[tuple[Tensor, Tensor]] = deque(maxlen=SHOWN)

    @classmethod
    def load(cls, path: Path | None) -> Backbone:
        """The network with the weights at this path: what the resolver calls.

        Raises:
            ValueError: The weights are others, or there is no such way to make it.
        """
        raise ValueError(
            f"{cls.__name__} cannot be made of a file: {path} was given. Build it and pass the "
            "module itself."
        )

    @property
    def takes_frames(self) -> bool:
        """Whether it has features of single frames."""
        return self.clip_len is None

    def freeze(self) -> None:
        """Evaluation mode, no gradients; for good."""
        self.eval()
        self.requires_grad_(False)

    @torch.no_grad()
    def features(self, block: Tensor) -> Tensor:
        """Features of a block; several metrics that show the same tensor in turn pay once.

        Args:
            block: What ``forward`` takes. It must not be changed in place afterwards.

        Returns:
            ``[N, d]`` of frames or clips.
        """
        # Tensors are held, not addresses, so no other tensor can be taken for one of them.
        for shown, found in self._shown:
            if shown is block:
                return found
        self._shown.append((block, self(block)))
        return self._shown[-1][1]


class Wrapped(Backbone):
    """Any module as a backbone: somebody's own network, under its own name.

    Args:
        module: Maps what the metric shows to features ``[N, d]``. Its attributes ``name``,
            ``recipe``, ``num_features`` and ``clip_len`` are taken over where it has them; ``d`` is
            otherwise found by one forward of grey frames of 64 x 64 pixels. It is frozen.

    Raises:
        ValueError: The module does not give features ``[N, d]``.

    Example:
        >>> encoder = Wrapped(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
        >>> encoder.name, encoder.num_features
        ('sequential', 12)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.name = getattr(module, "name", type(module).__name__.lower())
        self.recipe = getattr(module, "recipe", f"module {type(module).__name__} given by the user")
        self.clip_len = getattr(module, "clip_len", None)
        self.freeze()
        width = getattr(module, "num_features", None)
        self.num_features = self._measured() if width is None else int(width)

    @property
    def takes_frames(self) -> bool:
        """Whether it has features of single frames."""
        return getattr(self.module, "takes_frames", self.clip_len is None)

    @torch.no_grad()
    def forward(self, block: Tensor) -> Tensor:
        """Features of a block."""
        found = self.module(block)
        if isinstance(found, Tensor) and found.ndim == 1 and len(block) == 1:
            found = found.unsqueeze(0)  # some drop the axis of a single clip
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(block):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"The backbone '{self.name}' gave {shape} for a block {tuple(block.shape)}. "
                "Pass a module that maps [N, ...] to features [N, d]."
            )
        return found

    def _measured(self) -> int:
        place = next((tensor.device for tensor in self.module.parameters()), None)
        shape = (2, 3, 64, 64) if self.clip_len is None else (2, self.clip_len, 3, 64, 64)
        try:
            return self(torch.full(shape, 0.5, device=place)).shape[1]
        except (RuntimeError, IndexError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"The backbone '{self.name}' cannot look at a block {shape}: {reason}. One that "
                "takes clips [B, T, 3, H, W] needs an attribute clip_len = T, and one that takes "
                "other sizes an attribute num_features."
            ) from error


class RandomBackbone(Backbone):
    """Untrained convolutions with a fixed seed: for tests of plumbing, and for nothing else.

    Args:
        dims: 2 for frames, 3 for clips of 8 frames.
        num_features: Width of the features.
        seed: Of the weights.

    Example:
        >>> RandomBackbone(3)(torch.zeros(2, 8, 3, 16, 16)).shape
        torch.Size([2, 32])
    """

    def __init__(self, dims: int = 2, num_features: int = 32, seed: int = 0) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(
                f"There are no random convolutions in {dims} dimensions. Pass 2 for frames or 3 "
                "for clips."
            )
        self.name = f"random-{dims}dconv"
        self.num_features = num_features
        self.recipe = f"untrained {dims}-D convolutions, seed {seed}: meaningless outside tests"
        self.clip_len = None if dims == 2 else 8
        convolution = nn.Conv2d if dims == 2 else nn.Conv3d
        pool = nn.AdaptiveAvgPool2d if dims == 2 else nn.AdaptiveAvgPool3d
        with torch.random.fork_rng(devices=[]), in_float32():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                convolution(3, 16, 3, stride=2, padding=1),
                nn.GELU(),
                convolution(16, num_features, 3, stride=2, padding=1),
                pool(1),
                nn.Flatten(),
            )
        self.freeze()

    def forward(self, block: Tensor) -> Tensor:
        """Features of frames ``[N, 3, H, W]`` or of clips ``[B, T, 3, H, W]``."""
        return self.net(block if self.clip_len is None else block.transpose(1, 2))
