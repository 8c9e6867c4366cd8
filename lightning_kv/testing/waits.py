"""Operations that would make the host wait for a GPU, counted where there is none.

On a CPU nothing waits; counted are operations that need a number or a size that only the device
knows, or that carry data there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1]
UPLOAD = "upload"
ALWAYS = {
    "_local_scalar_dense", "_unique", "_unique2", "allclose", "argwhere", "bincount", "equal",
    "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
READS = {Tensor.tolist: "tolist", Tensor.cpu: "cpu", Tensor.numpy: "numpy"}
MAKES = (torch.tensor, torch.as_tensor)


@contextmanager
def waiting() -> Iterator[list[str]]:
    """Collect what would wait, each with the line of this package that does."""
    found: list[str] = []

    def note(what: str) -> None:
        found.append(f"{what} at {source_line()}")

    with Functions(note), Operations(note):
        yield found


class Operations(TorchDispatchMode):
    """Tells of operations whose result has a size, or is a number, that the host must know."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if would_wait(func, args, kwargs or {}):
            self.tell(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Tells of what is no operation of torch: reading a whole tensor, and making one from data."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            self.tell(READS[func])
        elif (func in MAKES and kwargs.get("device") is not None) or by_list(func, args):
            self.tell(UPLOAD)  # without a device the tensor may well be meant for the host
        return func(*args, **kwargs)


def would_wait(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operation of aten would wait on a GPU."""
    name, overload = func.overloadpacket.__name__, func._overloadname
    if name in INDEX:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        filled = len(args) > 2 and args[2].numel() == 1  # one number: torch fills, by the mask
        return bool(masks) and not filled
    if name == "repeat_interleave":
        return overload in ("Tensor", "self_Tensor") and kwargs.get("output_size") is None
    if name == "where":
        return overload == "default"
    if name == "one_hot":
        return len(args) < 2 or args[1] < 0
    if name == "isin" and overload == "Tensor_Tensor":  # few are compared, many are sorted
        return args[1].numel() >= 10 * args[0].numel() ** 0.145
    return name in ALWAYS


def by_list(func: Any, args: tuple) -> bool:
    """Whether a tensor is indexed by a list, which has to be carried to the device."""
    if func not in (Tensor.__getitem__, Tensor.__setitem__):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, list) for part in index)


def source_line() -> str:
    """``lightning_kv/cache/rows.py:12``: the innermost line of this package being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != "waits.py" and PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE.parent).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
