"""Means of queries that were taken beforehand, in a file.

Shapes: L layers, H heads, D head width.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_kv.cache.host import send
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.future_score import QueryMeans
from lightning_kv.policies.head_curves import HeadCurves

Rows = tuple[tuple[tuple[float, ...], ...], ...]
WANTED = (
    'Give a JSON file such as {"mean": [[[0.1, ...], ...], ...], "length": [[[0.3, ...], ...], '
    "...]}: for each layer and head D and D / 2 numbers; or a file of `lightning-kv calibrate`."
)


@dataclass(frozen=True)
class QueryTable:
    """Means of queries before rotation that were taken beforehand, and the file they come from.

    A part may do without: it is empty where none are given.

    Args:
        mean: By layer and head, the mean query: a complex number per pair, its parts side by side.
        length: By layer and head, the mean length of each pair.
        file: Name of the file; None where the numbers were given in place.
        sha256: Of that file.
    """

    mean: Rows = ()
    length: Rows = ()
    file: str | None = None
    sha256: str | None = None
    optional: ClassVar[bool] = True

    @classmethod
    def of(cls, value: Any) -> QueryTable:
        """From numbers given in place, or from what :func:`dataclasses.asdict` made of a table."""
        if isinstance(value, QueryTable):
            return value
        if not isinstance(value, dict) or value.keys() - {"mean", "length", "file", "sha256"}:
            raise ValueError(f"{str(value)[:60]} are no means of queries. {WANTED}")
        return cls(**value)

    @classmethod
    def read(cls, path: str | Path, name: str, folder: Path = Path()) -> QueryTable:
        """From a file of head curves (.safetensors), or from a JSON file.

        Args:
            path: Of the file.
            name: Of the setting.
            folder: Where the path starts.

        Raises:
            ValueError: No such file, or it holds no means of queries.
        """
        path = folder / path
        try:
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                extra = HeadCurves.load(path).extra
                found = {key: extra[f"query/{key}"].tolist() for key in ("mean", "length")}
            else:
                found = json.loads(content)
            rows = [
                tuple(tuple(tuple(map(float, head)) for head in layer) for layer in found[key])
                for key in ("mean", "length")
            ]
        except FileNotFoundError:
            raise ValueError(f"No means of queries at {str(path)!r}. {WANTED}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{str(path)!r} holds no means of queries: {text}. {WANTED}"
            ) from error
        return cls(*rows, path.name, hashlib.sha256(content).hexdigest())

    def check(self, geometry: Geometry) -> None:
        """Refuse those of another model.

        Raises:
            ValueError: They have another shape, or are no numbers.
        """
        if not self.mean and not self.length:
            return
        each = ((self.mean, geometry.head_dim), (self.length, geometry.head_dim // 2))
        for rows, width in each:
            fits = len(rows) == geometry.layers and all(len(own) == geometry.heads for own in rows)
            heads = [head for own in rows for head in own]
            if not fits or any(len(x) != width or not all(map(math.isfinite, x)) for x in heads):
                raise ValueError(
                    f"The means of queries{f' ({self.file})' if self.file else ''} were made for "
                    f"another model. This one has {geometry.layers} layers of {geometry.heads} "
                    f"heads of {geometry.head_dim} numbers: give finite ones for each."
                )

    def means(self, view: CacheView) -> QueryMeans:
        """Those of a view's layer, to be kept in a part's state."""
        each = self.mean[view.layer], self.length[view.layer]
        like = torch.empty(0, device=view.device)
        return QueryMeans(*(send(torch.tensor(x), like) for x in each), 0)


NO_QUERIES = QueryTable()
"""Not given: they are measured."""
