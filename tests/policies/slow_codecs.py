"""Codecs once more, one number at a time. Nothing is shared with the package."""

import math

import numpy as np


def eighth(x):
    """A number as fp8 e4m3: three bits behind the point, halves to even, at most 448."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3)
    return max(-448.0, min(448.0, round(x / step) * step))


def half(x):
    """A number as bfloat16: seven bits behind the point."""
    if x == 0:
        return 0.0
    step = 2.0 ** (math.floor(math.log2(abs(x))) - 7)
    return round(x / step) * step


def single(x):
    """A number as float32."""
    return float(np.float32(x))


def asym(block, by_scale=1.0, by_low=1.0):
    """Four levels from the least to the largest."""
    low = eighth(min(block) / by_low) * by_low
    step = eighth((max(block) - min(block)) / 3 / by_scale) * by_scale
    codes = [0 if step == 0 else min(3, max(0, round((x - low) / step))) for x in block]
    return [low + step * code for code in codes]


def sym(block):
    """Minus the largest, nothing, or the largest."""
    step = eighth(max(abs(x) for x in block))
    return [0.0 if step == 0 else step * min(1, max(-1, round(x / step))) for x in block]


def along(line, size, grid):
    """A line of numbers block by block, the last filled up with zeros."""
    out = []
    for low in range(0, len(line), size):
        block = line[low : low + size]
        out += grid(block + [0.0] * (size - len(block)))[: len(block)]
    return out


def integers(rows, bits):
    """Round to nearest with one scale for each row."""
    top, out = 2 ** (bits - 1) - 1, []
    for row in rows:
        step = max(abs(x) for x in row) / top
        out.append([step * min(top, max(-top, round(x / step))) if step else 0.0 for x in row])
    return out


def by_token(rows):
    """Blocks of 64 channels of one row."""
    return [along(row, min(64, len(row)), asym) for row in rows]


def by_channel(rows, factors=False):
    """Blocks of 128 rows of one channel."""
    size, columns = min(128, len(rows)), []
    for column in zip(*rows, strict=True):
        column = list(column)
        by = 1.0
        if factors:
            cut = [column[low : low + size] for low in range(0, len(column), size)]
            cut = [block + [0.0] * (size - len(block)) for block in cut]
            most = max(max((max(b) - min(b)) / 3, abs(min(b))) for b in cut)
            by = 2.0 ** math.ceil(math.log2(max(most, 2.0**-120)))
        columns.append(along(column, size, lambda block, by=by: asym(block, by, by)))
    return [list(row) for row in zip(*columns, strict=True)]


def distance(a, b):
    """Squared, of two rows."""
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def nearest(row, centres):
    """The index of the nearest centre."""
    return min(range(len(centres)), key=lambda i: distance(row, centres[i]))


def kmeans_step(rows, centres):
    """Each centre at the mean of the rows that are nearest to it."""
    mine = [nearest(row, centres) for row in rows]
    out = []
    for i, centre in enumerate(centres):
        own = [row for row, at in zip(rows, mine, strict=True) if at == i]
        mean = [sum(column) / len(own) for column in zip(*own, strict=True)] if own else centre
        out.append(mean)
    return out


def centroids(rows, steps=2):
    """The nearest of some centres, and three levels of what is left."""
    count = min(256, len(rows) // 16)
    centres = [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]
    for _ in range(steps if count else 0):
        centres = kmeans_step(rows, centres)
    centres, out = [[single(x) for x in centre] for centre in centres], []
    for row in rows:
        centre = centres[nearest(row, centres)] if count else [0.0] * len(row)
        rest = [x - c for x, c in zip(row, centre, strict=True)]
        rest = along(rest, min(64, len(row)), sym)
        out.append([c + x for c, x in zip(centre, rest, strict=True)])
    return out


def directions(x, count=4, steps=5):
    """Columns after some steps of subspace iteration from the first columns of the covariance."""
    spread = x.T @ x / len(x)
    found = np.linalg.qr(spread[:, : min(count, *x.shape)])[0]
    for _ in range(steps):
        found = np.linalg.qr(spread @ found)[0]
    return found


def principal(rows):
    """Mean, four coded coefficients, and the rest by channel."""
    mean = [half(sum(column) / len(rows)) for column in zip(*rows, strict=True)]
    rows = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
    vectors = directions(np.array(rows)).T
    vectors = [v if v[np.abs(v).argmax()] > 0 else -v for v in vectors]
    vectors = [[half(float(y)) for y in v] for v in vectors]
    turned = [[sum(a * b for a, b in zip(row, v, strict=True)) for v in vectors] for row in rows]
    by_scale = single(max(max(t) - min(t) for t in turned) / 3 / 448)
    by_low = single(max(abs(min(t)) for t in turned) / 448)
    turned = [asym(t, by_scale or 1.0, by_low or 1.0) for t in turned]
    along_them = [
        [sum(t * v[d] for t, v in zip(own, vectors, strict=True)) for d in range(len(mean))]
        for own in turned
    ]
    rest = by_channel(
        [
            [a - b for a, b in zip(*pair, strict=True)]
            for pair in zip(rows, along_them, strict=True)
        ],
        factors=True,
    )
    return [
        [m + a + b for m, a, b in zip(mean, *pair, strict=True)]
        for pair in zip(along_them, rest, strict=True)
    ]


CODINGS = {
    "int8": (lambda rows: integers(rows, 8),) * 2,
    "int4": (lambda rows: integers(rows, 4),) * 2,
    "kivi": (by_channel, by_token),
    "quant-video-gen": (centroids,) * 2,
    "budget-pca": (principal,) * 2,
}
"""Of keys and of values, by name."""
