"""What a part may answer: shapes, dtypes and numbers, refused before anything is written.

What only the device knows (NaN, numbers out of range) becomes a doubt of the view, and is raised
when the host next reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.decisions import Recode, Retention, Selection, Sums
from lightning_kv.cache.host import upload
from lightning_kv.cache.store import LayerStore
from lightning_kv.cache.view import CacheView, PassView


def named(part: Any, view: CacheView) -> str:
    """A part and where it was asked, as errors begin."""
    return (
        f"The {part.kind} part {part.name or type(part).__name__!r} (layer {view.layer}, chunk "
        f"{view.step.chunk})"
    )


def check_mask(
    mask: Tensor, shape: tuple[tuple[int, ...], ...], what: str, part: Any, view: CacheView
) -> None:
    """Refuse a tensor that is no mask of the expected shape.

    Args:
        mask: What was given.
        shape: The sizes that each axis may have.
        what: Its name, for the message.
        part: Who gave it.
        view: What it was shown.

    Raises:
        ValueError: Another dtype or shape.
    """
    allowed = " x ".join(" or ".join(map(str, dict.fromkeys(sizes))) for sizes in shape)
    fits = isinstance(mask, Tensor) and mask.ndim == len(shape)
    fits = fits and all(n in sizes for n, sizes in zip(mask.shape, shape, strict=True))
    if not fits or mask.dtype != torch.bool:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"{named(part, view)} gave {given} as {what}. Give a bool tensor of {allowed}."
        )


def check_selection(selection: Selection | None, view: PassView, part: Any) -> None:
    """Refuse a selection that does not fit its view.

    Raises:
        ValueError: Wrong type, dtype or shape.
    """
    if selection is None:
        return
    if not isinstance(selection, Selection):
        raise ValueError(
            f"{named(part, view)} answered {type(selection).__name__}. Give a Selection, or None "
            "to read all that is held."
        )
    heads, queries = (1, view.heads), (1, view.query_frames)
    if selection.frames is not None and selection.rows is not None:
        raise ValueError(
            f"{named(part, view)} gave frames and rows, and only one of them can count. Give "
            "`frames` where whole frames are read, else `rows`."
        )
    count = selection.count
    if isinstance(count, tuple) and len(count) != view.heads:
        raise ValueError(
            f"{named(part, view)} gave a count of {len(count)} numbers. Give one number, or one "
            f"for each of {view.heads} heads."
        )
    if isinstance(selection.frames, Tensor):
        check_mask(selection.frames, (heads, queries, (len(view.frames),)), "frames", part, view)
    if selection.rows is not None:
        check_mask(selection.rows, (heads, queries, (len(view),)), "rows", part, view)
    if selection.current is not None:
        sizes = (view.query_frames, view.flight)
        check_mask(selection.current, (heads, queries, sizes), "current", part, view)
    bias = selection.bias
    shape = (heads, queries, (len(view) + view.flight,))
    fits = bias is None or (bias.is_floating_point() and bias.ndim == 3)
    if not fits or (
        bias is not None and any(n not in s for n, s in zip(bias.shape, shape, strict=True))
    ):
        raise ValueError(
            f"{named(part, view)} gave a bias {bias.dtype} {tuple(bias.shape)}. Give floats of "
            f"1 or {view.heads} x 1 or {view.query_frames} x {len(view) + view.flight}."
        )
    if bias is not None:
        wrong = bias.isnan() | (bias == torch.inf)
        view.doubt(wrong.any(), f"{named(part, view)} gave a bias with NaN or +inf.")


def check_lag(lag: Any, view: CacheView, part: Any) -> None:
    """Refuse lags that do not fit their view.

    Raises:
        ValueError: Wrong type, dtype or shape.
    """
    sizes = ((1, view.heads), (1, view.query_frames), (len(view),))
    fits = isinstance(lag, Tensor) and lag.ndim == 3 and lag.is_floating_point()
    if not fits or any(n not in s for n, s in zip(lag.shape, sizes, strict=True)):
        given = f"{lag.dtype} {tuple(lag.shape)}" if isinstance(lag, Tensor) else repr(lag)
        raise ValueError(
            f"{named(part, view)} gave {given} as lags. Give floats of 1 or {view.heads} x 1 or "
            f"{view.query_frames} x {len(view)}: frames between a row and the query."
        )
    _finite(lag, "lags", part, view)


def _finite(x: Tensor | None, what: str, part: Any, view: CacheView) -> None:
    if x is not None and x.is_floating_point():
        text = f"{named(part, view)} gave {what} that are no numbers. Give finite ones."
        view.doubt(~x.isfinite().all(), text)


def check_retention(decision: Any, view: CacheView, part: Any) -> None:
    """Refuse a retention that does not fit its view, before anything is written.

    Raises:
        ValueError: Wrong type, dtype or shape. Numbers that are out of range are found on the
            device and raised at the next transfer, still before anything is written.
    """
    if decision is None:
        return
    if not isinstance(decision, Retention):
        raise ValueError(
            f"{named(part, view)} answered {type(decision).__name__}. Give a Retention, or None "
            "where nothing changes."
        )
    heads = (1, view.heads)
    rows, aside = (heads, (len(view),)), (heads, (len(view.archive),))
    for name, shape in (("keep", rows), ("archive", rows), ("discard", aside)):
        if getattr(decision, name) is not None:
            check_mask(getattr(decision, name), shape, name, part, view)
    for match in decision.match:
        check_mask(match.rows, rows, "match.rows", part, view)
        check_mask(match.like, rows, "match.like", part, view)
    given = {"time": decision.time, "weight": decision.weight} | decision.write
    for name, value in given.items():
        if value is None:
            continue
        _finite(value, name, part, view)
        if value.ndim != 2 or any(n not in s for n, s in zip(value.shape, rows, strict=True)):
            raise ValueError(
                f"{named(part, view)} gave {tuple(value.shape)} as {name}. Give one value for each "
                f"row: 1 or {view.heads} x {len(view)}."
            )
    unknown = sorted(decision.write.keys() - set(view.columns))
    if unknown:
        raise ValueError(
            f"{named(part, view)} writes the columns {unknown}, which no part declares. Declared: "
            f"{sorted(view.columns)}. Add them to the part's `columns`."
        )
    _check_place(decision.place, len(view), view, part)
    _finite(decision.place, "places", part, view)
    if decision.sums is not None:
        _check_sums(decision.sums, view, part)


def _check_sums(sums: Sums, view: CacheView, part: Any) -> None:
    total, made = len(view) + len(view.archive), sums.frame_id.shape[-1]
    pairs = [sums.source, sums.target, sums.coefficient]
    rows = [x for x in (sums.frame_id, sums.time, sums.weight) if x is not None]
    for group in (pairs, rows):
        sizes = {x.shape[-1] for x in group}
        if len(sizes) > 1 or any(x.ndim != 2 or len(x) not in (1, view.heads) for x in group):
            raise ValueError(
                f"{named(part, view)} gave sums of shapes {[tuple(x.shape) for x in group]}. Pairs "
                f"(source, target, coefficient) are 1 or {view.heads} x E, new rows 1 or "
                f"{view.heads} x R."
            )
    ids = sums.frame_id.dtype in (torch.int32, torch.int64)
    if not ids or {sums.source.dtype, sums.target.dtype} != {torch.int64}:
        raise ValueError(
            f"{named(part, view)} names rows by {sums.source.dtype}, {sums.target.dtype} and "
            f"frames by {sums.frame_id.dtype}. Give int64 rows, and int32 or int64 frames."
        )
    _check_place(sums.place, made, view, part)
    width, correction = view.geometry.head_dim, sums.correction
    if correction is not None and (
        correction.ndim != 3
        or len(correction) not in (1, view.heads)
        or tuple(correction.shape[1:]) != (made, width)
    ):
        raise ValueError(
            f"{named(part, view)} gave a correction {tuple(correction.shape)}. Give 1 or "
            f"{view.heads} x {made} x {width}."
        )
    for name in ("time", "place", "weight", "correction"):
        _finite(getattr(sums, name), f"sums.{name}", part, view)
    there, own = sums.source >= 0, sums.target
    wrong = (sums.source >= total) | (there & ((own < 0) | (own >= made)))
    view.doubt(
        wrong.any(),
        f"{named(part, view)} sums rows that are not there. Sources are 0 to {total - 1} (memory, "
        f"then archive; -1 for none), targets 0 to {made - 1}.",
    )
    known = upload((*view.frames, *view.archive.frames, -1), sums.frame_id, torch.int64)
    strange = ~(sums.frame_id.long().unsqueeze(-1) == known).any(-1)
    view.doubt(
        strange.any(),
        f"{named(part, view)} lets a sum count for a frame that is neither held nor archived. "
        "Give one of view.frames or view.archive.frames, or -1 for no row.",
    )
    view.doubt(
        ~sums.coefficient.isfinite().all(),
        f"{named(part, view)} gave a sum with a NaN coefficient, or an infinite one.",
    )


def _check_place(place: Tensor | None, rows: int, view: CacheView, part: Any) -> None:
    fits = place is None or (place.ndim == 3 and len(place) in (1, view.heads))
    if not fits or (place is not None and tuple(place.shape[1:]) != (rows, 2)):
        raise ValueError(
            f"{named(part, view)} gave places {tuple(place.shape)}. Give row and column of each: "
            f"1 or {view.heads} x {rows} x 2."
        )


def check_recodes(recodes: Any, view: CacheView, part: Any) -> None:
    """Refuse codecs that are not known, or rows that do not fit the view.

    Raises:
        ValueError: Says which.
    """
    for recode in recodes:
        if not isinstance(recode, Recode) or recode.codec not in CODECS:
            given = getattr(recode, "codec", type(recode).__name__)
            raise ValueError(
                f"{named(part, view)} asks for the codec {given!r}. Give a Recode with one of "
                f"{', '.join(CODECS)}."
            )
        check_mask(recode.rows, ((1, view.heads), (len(view),)), "rows", part, view)


@contextmanager
def asking(part: Any, view: CacheView, stores: Sequence[LayerStore]) -> Iterator[None]:
    """While a part is asked: its decisions are constants, and it may look but not write.

    Raises:
        ValueError: It has written to a tensor of the view's layer (in layer 0: of any layer).
    """
    seen = stores if view.layer == 0 else [view._store]
    shown = view.shown()
    before = [store.writes for store in seen], [x._version for x in shown]
    with torch.no_grad():
        yield
    if before != ([store.writes for store in seen], [x._version for x in shown]):
        raise ValueError(
            f"{named(part, view)} has written to a tensor that it was shown. What a view shows is "
            "the cache itself: clone() what is to be changed."
        )
