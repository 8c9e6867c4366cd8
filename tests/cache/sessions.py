"""The small geometry of these tests: its policies, sessions, passes, and what goes through them."""

import torch

from lightning_kv import testing
from lightning_kv.cache.decisions import Sums
from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import Rotary
from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import build_part
from lightning_kv.testing import Twin, chunked
from lightning_kv.testing import assert_same_rows as assert_same_rows

GEOMETRY = Geometry(layers=2, heads=3, head_dim=12, grid=(2, 2), rotary=Rotary(12), train_horizon=8)
CHUNK = 2

# Absolute positions hold rotated keys, a clamp that never bites holds raw ones: same numbers.
STORAGE = {"rotated": "absolute", "raw": {"part": "clamp", "lag": 10_000}}


def policy(retain="everything", select="everything", positions="absolute", bias=None, **other):
    parts = {"retain": retain, "select": select, "positions": positions}
    parts["precision"] = other.get("precision", "as-computed")
    built = {k: build_part(k, x) if isinstance(x, str | dict) else x for k, x in parts.items()}
    return CachePolicy("test", **built, bias=bias)


def session_of(made, batch=1, **settings):
    return CacheSession(GEOMETRY, made, tuple(range(batch)), **settings)


def store_of(session, layer=0, sample=0):
    return session.samples[sample].stores["cond"][layer]


def turn(vector, time, place, sign=1.0):
    """Rotary embedding of one vector in this geometry."""
    return testing.turn(GEOMETRY, vector, time, place, sign)


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


def passes(chunks=5, noisy=2):
    """The passes of a small rollout."""
    yield from chunked((CHUNK,) * chunks, noisy)


def rolling(chunks=4, flight=2, apart=True):
    """Several chunks in flight; the oldest is committed apart, or as a part of the same pass."""
    for chunk in range(chunks):
        frames = tuple(range(chunk * CHUNK, (chunk + flight) * CHUNK))
        levels = tuple(250.0 * (1 + i // CHUNK) for i in range(len(frames)))
        oldest = frames[:CHUNK]
        yield Pass("denoise", frames, levels, chunk, 0, () if apart else oldest, True, CHUNK)
        if apart:
            yield Pass("commit", oldest, (0.0,) * CHUNK, chunk, 0, oldest, False, CHUNK)


def tape(steps, batch=1, seed=0, gain=1.0, loud=0.0, dtype=torch.float32):
    """Random queries, keys and values for every pass and layer.

    ``gain`` multiplies the queries: above 1 attention is sharper. With ``loud`` above 0 the values
    of tokens differ in length.
    """
    rng, found = torch.Generator().manual_seed(seed), []
    for step in steps:
        shape = (batch, len(step.frames) * GEOMETRY.tokens, GEOMETRY.heads, GEOMETRY.head_dim)
        for layer in range(GEOMETRY.layers):
            q, k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in range(3))
            if loud:
                v = v * (loud * torch.randn(*shape[:-1], 1, generator=rng)).exp()
            found.append((step, layer, gain * q, k, v))
    return found


def play(on, recorded, check=None, event=None):
    """Run what was recorded through a session or a twin; all outputs, in order."""
    out = []
    for step, layer, q, k, v in recorded:
        if event and step.opens and layer == 0:
            event(on, step)
        out.append(on.attend(layer, q, k, v, step).double())
        if layer == GEOMETRY.layers - 1:
            if check:
                check(step)
            on.finish(step)
    return out


def drive(session, steps, batch=2, seed=0, check=None, dtype=torch.float32):
    """Run random queries, keys and values through a session; all its outputs, in order."""
    return play(session, tape(steps, batch, seed, dtype=dtype), check)


def assert_both_agree(made, script, batch=2, chunks=5, steps=None, **settings):
    """Outputs of the session and of the twin must agree; returns both."""
    session, twin = session_of(made, batch, **settings), Twin(GEOMETRY, batch, script)
    recorded = tape(steps or passes(chunks), batch)
    assert_same_outputs(session, twin, recorded)
    return session, twin


def assert_same_outputs(session, twin, recorded, tolerance=2e-5, event=None):
    ours, theirs = (play(x, recorded, event=event) for x in (session, twin))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a, b, atol=tolerance, rtol=0, msg=lambda m, i=i: f"call {i}, {recorded[i][0]}: {m}"
        )
