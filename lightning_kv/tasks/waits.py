"""Where a rollout makes the host wait for the device.

On a CUDA device torch says so itself. On a CPU nothing waits, and the operations are counted that
would on a GPU: they need a number or a size that only the device knows, or carry data there.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kv.cache.passes import Pass
from lightning_kv.models.samplers import Sampler
from lightning_kv.tasks.timing import looked_at

KINDS = ("first", "denoise", "commit", "sampler")
"""The first pass of a chunk, later denoising passes, commit passes, and noise between passes."""

PACKAGE = Path(__file__).parents[1]
SAID = "called a synchronizing CUDA operation"
UPLOAD = "upload"
ALWAYS = {
    "_local_scalar_dense", "_unique", "_unique2", "allclose", "argwhere", "bincount", "equal",
    "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
READS = {Tensor.tolist: "tolist", Tensor.cpu: "cpu", Tensor.numpy: "numpy"}
MAKES = (torch.tensor, torch.as_tensor)


@dataclass
class Waits:
    """What was waited for.

    Args:
        found: Chunk, kind of pass, operation and source line of each wait.
        passes: Chunk and kind of each pass.
        chunk: The current one, from 0.
        now: Kind of the current pass.
    """

    found: list[tuple[int, str, str, str]] = field(default_factory=list)
    passes: list[tuple[int, str]] = field(default_factory=list)
    chunk: int = 0
    now: str = KINDS[-1]

    def note(self, what: str) -> None:
        """One more, on the innermost line of this package that is being executed."""
        self.found.append((self.chunk, self.now, what, source_line()))

    def watched(self, sampler: Sampler) -> Sampler:
        """The same sampler; it says where a rollout is."""
        return looked_at(sampler, self._before, self._after)

    def summary(self, chunk: int) -> dict[str, Any]:
        """Of one chunk, as plain data: by kind of pass, by operation, and the ten worst lines."""
        own = [wait[1:] for wait in self.found if wait[0] == chunk]
        lines = Counter(line for _, _, line in own).most_common(10)
        return {
            "chunk": chunk,
            "total": len(own),
            "by_pass": {kind: sum(k == kind for k, _, _ in own) for kind in KINDS},
            "passes": {kind: self.passes.count((chunk, kind)) for kind in KINDS[:-1]},
            "by_operation": dict(Counter(what for _, what, _ in own).most_common()),
            "lines": [{"line": line, "waits": count} for line, count in lines],
            "per_chunk": [sum(w[0] == i for w in self.found) for i in range(self.chunk)],
        }

    def _before(self, step: Pass) -> None:
        self.now = KINDS[0] if step.opens else step.phase
        self.passes.append((self.chunk, self.now))

    def _after(self, step: Pass) -> None:
        self.now = KINDS[-1]
        self.chunk += step.phase == "commit"


@contextmanager
def counting(device: str | torch.device) -> Iterator[Waits]:
    """Count what waits on a CUDA device, or what would if the CPU were one."""
    waits = Waits()
    if torch.device(device).type == "cpu":
        with Functions(waits.note), Operations(waits.note):
            yield waits
        return

    def shown(message: Any, *more: Any, **named: Any) -> None:
        if SAID in str(message):
            waits.note("wait")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
        if path != Path(__file__) and PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE.parent).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
