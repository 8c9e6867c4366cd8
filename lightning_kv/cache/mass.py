"""Reference tables of softmax mass: by frame, and on request by row.

Shapes: C chunks, L layers, H heads, F frames of the clip, T tokens of a frame, N held rows,
P rows in flight.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_kv.cache.recorder import COMMIT, LIMIT, Clip, Recorder, weight_of
from lightning_kv.cache.view import PassView


@dataclass
class FrameMass:
    """Softmax mass by frame, mean over the queries of a chunk.

    Args:
        clip: Whose it is.
        mass: By namespace, float32 ``[C, L, H, F]``; a line over F sums to 1.
        queries: That it was recorded with.
    """

    clip: Clip
    mass: dict[str, Tensor]
    queries: int


class MassRecorder(Recorder):
    """Mass by frame of every chunk, layer and head: 7.6 MB for 126 frames of Wan 1.3B.

    A chunk's passes are those in which it is the next to become final: what the cache must serve
    between two commits, the queries of younger chunks in flight included.

    Args:
        queries: Largest number of evenly spaced query rows that stand for those of a pass.
        limit: See :class:`Recorder`.
    """

    name, makes = "mass", FrameMass

    def __init__(self, queries: int = 520, limit: int = LIMIT) -> None:
        super().__init__(queries, limit)
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._weights: dict[tuple[int, str], list[float]] = {}

    def size(self, clip: Clip) -> int:
        """4 bytes for each chunk, layer, head and frame, in each namespace."""
        of = clip.geometry
        return 4 * clip.chunks * of.layers * of.heads * clip.frames * of.branches

    def note(self, view: PassView) -> None:
        """Add the mass of a pass."""
        clip, step, place = self.clips[view.sample], view.step, (view.sample, view.step.namespace)
        if place not in self._sums:
            shape = (clip.chunks, clip.geometry.layers, clip.geometry.heads, clip.frames)
            self._sums[place] = torch.zeros(shape, device=view.device)
            self._weights[place] = [0.0] * clip.chunks
        held, own = mass_of(view, self.queries)
        weight = weight_of(step)
        line = self._sums[place][step.chunk, view.layer]
        if view.frames:
            line[:, view.frame_ids] += weight * view.by_frame(held)[:, 0]
        line[:, step.start : step.frames[-1] + 1] += (
            weight * own.unflatten(-1, (len(step.frames), -1)).sum(-1)[:, 0]
        )
        if not view.layer:
            self._weights[place][step.chunk] += weight

    def table(self, sample: int) -> FrameMass:
        """Means over the passes of each chunk."""
        found = {}
        for (owner, namespace), total in self._sums.items():
            if owner == sample:
                weight = total.new_tensor(self._weights[owner, namespace]).clamp_min(COMMIT)
                found[namespace] = total / weight.view(-1, 1, 1, 1)
        return FrameMass(self.clips[sample], found, self.queries)


def mass_of(view: PassView, queries: int) -> tuple[Tensor, Tensor]:
    """Mean mass of the queries of a pass on held rows ``[H, 1, N]`` and own rows ``[H, 1, P]``."""
    count, rows = view.query.shape[1], None
    if count > queries and not view.apart:
        rows = torch.linspace(0, count - 1, queries, device=view.device).round().long()
    held, own = view.attention(queries=rows)
    return held / (count if rows is None else queries), own / (count if rows is None else queries)


@dataclass
class RowMass:
    """Softmax mass by row of some chunks, on disk.

    Args:
        clip: Whose it is.
        files: By namespace and chunk: float32 ``[L, H, F, T]`` in raster order, as raw numbers.
        queries: That it was recorded with.
    """

    clip: Clip
    files: dict[tuple[str, int], Path]
    queries: int

    def mass(self, chunk: int, namespace: str = "cond") -> Tensor:
        """Mean over the queries of one chunk, ``[L, H, F, T]``, read as it is used.

        Raises:
            ValueError: This chunk was not recorded, or its file is gone.
        """
        if (namespace, chunk) not in self.files:
            known = ", ".join(str(own) for space, own in self.files if space == namespace)
            raise ValueError(
                f"The mass by row of chunk {chunk} ({namespace}) was not recorded. Chunks that "
                f"were: {known or 'none'}. Name it in `chunks` when recording."
            )
        path = self.files[namespace, chunk]
        if not path.is_file():
            raise ValueError(
                f"The mass by row of chunk {chunk} ({namespace}) is gone: {path} was removed. "
                "Record it again, and keep the folder as long as its table."
            )
        return _mapped(path, self.clip, shared=False)


class RowRecorder(Recorder):
    """Mass by row of stated chunks, in files, so that memory does not grow.

    Args:
        chunks: Which; each takes 4 bytes x layers x heads x frames x tokens, in each namespace:
            47 MB for 21 frames of Wan 1.3B.
        folder: Where the files go, each recording's into a new folder of its own.
        queries: As for :class:`MassRecorder`.
        limit: See :class:`Recorder`.
    """

    name, makes = "rows", RowMass

    def __init__(
        self, chunks: Sequence[int], folder: str | Path, queries: int = 520, limit: int = LIMIT
    ) -> None:
        super().__init__(queries, limit)
        self.chunks, self.folder = tuple(chunks), Path(folder)
        self._files: dict[tuple[int, str, int], Path] = {}
        self._weights: dict[tuple[int, str, int], float] = defaultdict(float)

    def size(self, clip: Clip) -> int:
        """4 bytes for each layer, head, frame and token of the stated chunks."""
        of = clip.geometry
        each = 4 * of.layers * of.heads * clip.frames * of.tokens
        return each * len(self.chunks) * of.branches

    def begin(self, clips: Sequence[Clip]) -> None:
        """See :class:`Recorder`."""
        super().begin(clips)
        if wrong := [c for c in self.chunks if not 0 <= c < clips[0].chunks]:
            raise ValueError(
                f"Mass by row was asked of chunks {wrong}, and the rollout has "
                f"{clips[0].chunks}, counted from 0. Name some of these."
            )

    def note(self, view: PassView) -> None:
        """Add the mass of a pass to its chunk's file."""
        step = view.step
        if step.chunk not in self.chunks:
            return
        place, clip = (view.sample, step.namespace, step.chunk), self.clips[view.sample]
        if place not in self._files:
            if not self._files:  # other recordings, batches and ranks may use the same folder
                self.folder.mkdir(parents=True, exist_ok=True)
                self.folder = Path(tempfile.mkdtemp(prefix="mass-", dir=self.folder))
            file = f"{view.sample:03d}-{step.namespace}-{step.chunk:03d}.f32"
            self._files[place] = self.folder / file
        if not view.layer:
            self._weights[place] += weight_of(step)
        held, own = mass_of(view, self.queries)
        tokens = clip.geometry.tokens
        index = view.frame_id.long() * tokens + view.raster
        line = held.new_zeros(view.heads, clip.frames * tokens)
        line.scatter_add_(1, index.expand(view.heads, -1), held[:, 0].masked_fill(~view.valid, 0))
        line[:, step.start * tokens : (step.frames[-1] + 1) * tokens] += own[:, 0]
        every = _mapped(self._files[place], clip)
        every[view.layer] += weight_of(step) * line.cpu().view_as(every[view.layer])

    def table(self, sample: int) -> RowMass:
        """Means over the passes of each chunk."""
        own = {place: path for place, path in self._files.items() if place[0] == sample}
        for place, path in own.items():
            _mapped(path, self.clips[sample]).div_(self._weights.pop(place, 1.0))
        return RowMass(
            self.clips[sample], {place[1:]: path for place, path in own.items()}, self.queries
        )


def _mapped(path: Path, clip: Clip, shared: bool = True) -> Tensor:
    """The numbers of a file; where ``shared`` it is made if missing, and changes are written."""
    of = clip.geometry
    shape = (of.layers, of.heads, clip.frames, of.tokens)
    size = of.layers * of.heads * clip.frames * of.tokens
    return torch.from_file(str(path), shared=shared, size=size, dtype=torch.float32).view(shape)
