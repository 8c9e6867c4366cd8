"""Policies and sessions of the twin's geometry, and ways to compare a session with its twin."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from twin import CHUNK, GEOMETRY, Twin, drive, passes, spot, turn

from lightning_kv.cache.decisions import Sums
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import build_part

# Absolute positions hold rotated keys, a clamp that never bites holds raw ones: same numbers.
STORAGE = {"rotated": "absolute", "raw": {"part": "clamp", "lag": 10_000}}
FIELDS = (("frame_id", "frame"), ("time", "time"), ("weight", "weight"))


def policy(retain="everything", select="everything", positions="absolute", bias=None, **other):
    parts = {"retain": retain, "select": select, "positions": positions}
    parts["precision"] = other.get("precision", "as-computed")
    built = {k: build_part(k, x) if isinstance(x, str | dict) else x for k, x in parts.items()}
    return CachePolicy("test", **built, bias=bias)


def session_of(made, batch=1, **settings):
    return CacheSession(GEOMETRY, made, tuple(range(batch)), **settings)


def store_of(session, layer=0, sample=0):
    return session.samples[sample].stores["cond"][layer]


def stream_of(rows, head):
    """Fields, columns, keys and values of the rows of one head."""
    group = next(g for g in rows.groups if head in g.heads)
    at = group.heads.index(head)
    found = {name: x[at if len(x) > 1 else 0] for name, x in group.meta.items()}
    return found | {name: group.payload(name)[at] for name in ("k", "v")}


def padded(lines, fill=-1):
    """Lists of unequal length as one tensor, ``fill`` behind the shorter ones."""
    size = max(map(len, lines))
    return torch.tensor([[*line, *[fill] * (size - len(line))] for line in lines])


def copies(view, rows, time):
    """Sums that copy rows of a table (memory, then archive) to other times."""
    fields = {}
    for name in ("frame_id", "place", "weight"):
        both = [x.field(name)[0] for x in (view, view.archive)]
        fields[name] = torch.cat(both)[rows].unsqueeze(0)
    index = torch.arange(len(rows)).unsqueeze(0)
    ones = torch.ones(1, len(rows))
    return Sums(rows.unsqueeze(0), index, ones, time=time.unsqueeze(0), **fields)


def rolling(apart):
    """Two chunks in flight; the older one is committed apart, or as a part of the same pass."""
    for chunk in range(4):
        flight = tuple(range(chunk * CHUNK, (chunk + 2) * CHUNK))
        oldest = flight[:CHUNK]
        levels = (250.0,) * CHUNK + (750.0,) * CHUNK
        yield Pass("denoise", flight, levels, chunk, 0, () if apart else oldest, True, CHUNK)
        if apart:
            yield Pass("commit", oldest, (0.0,) * CHUNK, chunk, 0, oldest, False, CHUNK)


def assert_both_agree(made, script, batch=2, chunks=5, steps=None, **settings):
    """Outputs of the session and of the twin must agree; returns both."""
    session, twin = session_of(made, batch, **settings), Twin(batch, script)
    steps = list(steps or passes(chunks))
    ours, theirs = drive(session, steps, batch), drive(twin, steps, batch)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=lambda m, i=i: f"call {i}: {m}")
    return session, twin


def assert_same_rows(session, twin):
    """Memory and archive of both hold the same rows."""
    for (b, layer, h), stream in twin.streams.items():
        store = store_of(session, layer, b)
        for held, rows in ((store.memory, stream.rows), (store.archive, stream.archive)):
            mine = stream_of(held, h)
            for name, attribute in FIELDS:
                theirs = [getattr(r, attribute) for r in rows]
                assert mine[name].tolist() == pytest.approx(theirs, abs=1e-5), (name, b, layer, h)
            spots = torch.tensor([spot(r.place) for r in rows]).view(-1, 2)
            torch.testing.assert_close(mine["place"], spots.float())
            for name in store.columns:
                theirs = [r.columns[name] for r in rows]
                assert mine[name].tolist() == pytest.approx(theirs, abs=1e-4), name
            if not rows:
                assert not len(mine["k"])
                continue
            keys = [turn(r.k, r.time, r.place) if store.rotated else r.k.double() for r in rows]
            values = torch.stack([r.v.double() for r in rows])
            for name, theirs in (("k", torch.stack(keys)), ("v", values)):
                torch.testing.assert_close(mine[name].double(), theirs, atol=1e-4, rtol=0)
        ids = {
            r.frame
            for own in twin.streams.values()
            for r in own.rows
            if own.sample == b and own.layer == layer
        }
        assert store.frames == tuple(sorted(ids)), "the host knows the held frames"
