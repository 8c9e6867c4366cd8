"""Where a rollout makes the host wait for the device.

On a CUDA device torch says so itself. On a CPU nothing waits, and the operations are counted that
would on a GPU: they need a number or a size that only the device knows, or carry data there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_kv.cache.passes import Pass
from lightning_kv.models.samplers import Sampler
from lightning_kv.tasks.benchmark.timing import looked_at
from lightning_kv.testing.waits import Functions, Operations, source_line

KINDS = ("first", "denoise", "commit", "sampler")
"""The first pass of a chunk, later denoising passes, commit passes, and noise between passes."""

SAID = "called a synchronizing CUDA operation"


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
