"""Rules of small policies, each said twice: in tensors for a session, in loops for its twin."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).parent))
from sessions import GEOMETRY, padded, turn

from lightning_kv.cache.decisions import Retention, Selection, Sums
from lightning_kv.policies.base import RetainPart, SelectPart
from lightning_kv.testing import Row, Script

TOKENS = GEOMETRY.tokens
PLACES = GEOMETRY.places().float().unsqueeze(0)  # [1, TOKENS, 2]
SHARES = [[0.5, 1.0, 1.5], [1.0, 1.0, 0.25]]
RAGGED = {"part": "window", "budget": {"part": "table", "amount": "4f", "shares": SHARES}}


class WindowScript(Script):
    def __init__(self, budget, sink):
        self.budget, self.sink = budget, sink

    def commit(self, stream, step):
        frames = sorted({r.frame for r in stream.rows})
        sink = [f for f in frames if f < self.sink]
        late = [f for f in frames if f >= self.sink][-(self.budget - len(sink)) :]
        stream.rows = [r for r in stream.rows if r.frame in sink + late]


@dataclass(frozen=True)
class Fold(RetainPart):
    """Old rows become two merged rows per place: one source feeds both."""

    columns: ClassVar[dict[str, str]] = {
        "total": "sum",
        "best": "max",
        "mark": "keep",
        "level": "mean",
    }
    align: str = "raw"
    shift: float = 0.25

    def commit(self, views, state):
        return [self.fold(view) for view in views]

    def fold(self, view):
        new, own = view.frame_id >= view.step.start, view.frame_id.float() + view.layer
        write = {  # only the new rows get a value, the old ones carry theirs
            name: torch.where(new | (view.step.chunk == 0), own, view.field(name))
            for name in self.columns
        }
        if view.step.chunk < 2:
            return Retention(write=write)
        old = (view.frame_id < view.step.start).expand(view.heads, -1) & view.valid
        old[0] = False  # one head merges nothing: the streams become ragged
        lines = {"source": [], "target": [], "coefficient": []}
        place, weight = (x.expand(view.heads, -1) for x in (view.raster, view.weight))
        for h in range(view.heads):
            rows = old[h].nonzero().flatten()
            spots, weights = place[h, rows], weight[h, rows]
            lines["source"].append([*rows.tolist(), *rows.tolist()])
            lines["target"].append([*spots.tolist(), *(spots + TOKENS).tolist()])
            lines["coefficient"].append([*(weights * 0.125).tolist(), *(weights * 0.2).tolist()])
        frames = torch.full((view.heads, 2 * TOKENS), view.step.start - 1)
        frames[0] = -1
        sums = Sums(
            **{name: padded(x) for name, x in lines.items()},
            frame_id=frames,
            time=torch.full((1, 2 * TOKENS), view.step.start - 1 + self.shift),
            place=PLACES.repeat(1, 2, 1),
            align=self.align,
            correction=torch.full((1, 2 * TOKENS, GEOMETRY.head_dim), 0.1),
        )
        return Retention(keep=~old & view.valid, sums=sums, write=write)


class FoldScript(Script):
    def __init__(self, align, shift=0.25):
        self.align, self.shift = align, shift

    def fresh(self, row):
        row.columns = dict.fromkeys(Fold.columns, 0.0)
        return row

    def commit(self, stream, step):
        for r in stream.rows:
            if step.chunk == 0 or r.frame >= step.start:
                r.columns = dict.fromkeys(Fold.columns, float(r.frame + stream.layer))
        if step.chunk < 2 or stream.head == 0:
            return
        old = [r for r in stream.rows if r.frame < step.start]
        fresh = [r for r in stream.rows if r.frame >= step.start]
        for factor in (0.125, 0.2):
            for place in range(TOKENS):
                fresh.append(self.merged([r for r in old if r.place == place], factor, place, step))
        stream.rows = fresh

    def merged(self, sources, factor, place, step):
        time = step.start - 1 + self.shift
        shares = [factor * r.weight for r in sources]
        if self.align == "raw":
            k = sum(s * r.k.double() for s, r in zip(shares, sources, strict=True))
        else:
            k = sum(s * turn(r.k, r.time, r.place) for s, r in zip(shares, sources, strict=True))
            k = turn(k, time, place, sign=-1)
        best = max(range(len(shares)), key=lambda i: (shares[i], -i))
        values = {name: [r.columns[name] for r in sources] for name in Fold.columns}
        return Row(
            step.start - 1,
            time,
            place,
            k + 0.1,
            sum(s * r.v.double() for s, r in zip(shares, sources, strict=True)),
            weight=sum(r.weight for r in sources),
            columns={
                "total": sum(values["total"]),
                "best": max(values["best"]),
                "mark": values["mark"][best],
                "level": sum(s * x for s, x in zip(shares, values["level"], strict=True))
                / sum(shares),
            },
        )

    def bias(self, stream, step, frame, index, row):
        return math.log(row.weight)


@dataclass(frozen=True)
class ByParity(SelectPart):
    """Query frame f of head h reads the frames of its parity, of its own chunk only itself."""

    def pick(self, view, state):
        head = torch.arange(view.heads).view(-1, 1, 1)
        query = torch.tensor(view.step.frames).view(1, -1, 1)
        frames = (view.frame_ids.view(1, 1, -1) + query + head) % 2 == 0
        own = torch.tensor(view.step.frames).view(1, 1, -1) == query
        return Selection(frames=frames, current=own.expand(view.heads, -1, -1))


class ParityScript(Script):
    def reads(self, stream, step, frame, index, row, current):
        return row.frame == frame if current else (row.frame + frame + stream.head) % 2 == 0


class RaggedScript(Script):
    def commit(self, stream, step):
        last = round(4 * SHARES[stream.layer][stream.head])
        frames = sorted({r.frame for r in stream.rows})[-last:]
        stream.rows = [r for r in stream.rows if r.frame in frames]
