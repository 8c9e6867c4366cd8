"""Of a file of head curves what a budget part holds: one curve for each head, and the file's mark.

Shapes: L layers, H heads, Bn budgets of the grid.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.policies.cache_spec import CacheSpec
from lightning_kv.policies.head_curves import (
    MAKE,
    HeadCurves,
    check_shape,
    limited,
)
from lightning_kv.policies.tables import HEADS
from lightning_kv.utilities.files import checksum

Rows = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Reading:
    """Which of a file's curves are meant.

    Args:
        scorer: See :meth:`~lightning_kv.policies.head_curves.HeadCurves.curve`.
        metric: See there.
        objective: See there.
        shrink: See there.
        importance: See :meth:`~lightning_kv.policies.head_curves.HeadCurves.important`.
    """

    scorer: str
    metric: str
    objective: str
    shrink: bool
    importance: str

    @property
    def words(self) -> str:
        """In a line."""
        how = "shrunk" if self.shrink else "as measured"
        return f"{self.scorer}/{self.metric}, {self.objective}, {how}, by {self.importance}"


@dataclass(frozen=True)
class CurveTable:
    """One curve for each head, and the file that it was read from.

    Args:
        budgets: The grid, in history frames.
        curve: A row per layer, of a row of losses per head.
        importance: A row per layer, one number per head.
        reading: Which of the file's curves these are, in words; nothing before they are chosen.
        model: Name of the model that was measured; nothing where it is not known, as below.
        head_dim: Width of its heads.
        grid: Its token rows and columns.
        chunk: Frames of its chunks.
        prompts: Keys of the prompts that were measured: nothing is to be judged on these.
        weights: What tells the weights that were measured from others; nothing as above.
        cache: With which cache it was measured; None where it is not known.
        file: Name of the file, or ``auto``.
        sha256: Of the file; of ``auto``, of all that are shipped.
        path: Of a file whose curves are not chosen yet.
    """

    budgets: tuple[int, ...] = ()
    curve: Rows = ()
    importance: Rows = ()
    reading: str = ""
    model: str = ""
    head_dim: int = 0
    grid: tuple[int, ...] = ()
    chunk: int = 0
    prompts: tuple[str, ...] = ()
    weights: str = ""
    cache: CacheSpec | None = None
    file: str | None = None
    sha256: str | None = None
    path: str = ""

    def __hash__(self) -> int:
        """Of the file's mark: the curves themselves are long."""
        return hash((self.file, self.sha256, self.reading, self.path))

    @classmethod
    def of(cls, value: Any) -> CurveTable:
        """From what a setting may be.

        Args:
            value: A table, ``auto``, the path of a file, or what :func:`dataclasses.asdict` made
                of a table.

        Raises:
            ValueError: It is none of them.
        """
        if isinstance(value, CurveTable):
            return value
        if isinstance(value, str | Path):
            return cls.read(value, "heads")
        if not isinstance(value, dict) or value.keys() - set(cls.__dataclass_fields__):
            raise ValueError(
                f"{str(value)[:60]} is no file of head curves. Give the path of a .safetensors "
                f"file, or auto (the one shipped for the model). {MAKE}"
            )
        cache = value.get("cache")
        return cls(**value | ({"cache": CacheSpec(**cache)} if isinstance(cache, dict) else {}))

    @classmethod
    def read(cls, path: str | Path, name: str, folder: Path = Path()) -> CurveTable:
        """From a file; which of its curves are meant is chosen later (:meth:`chosen`).

        Args:
            path: Of the file, or ``auto``.
            name: Of the setting.
            folder: Where a path starts.
        """
        if str(path) == "auto":
            return AUTO_CURVES
        return cls(file=Path(path).name, path=str(folder / path))

    def chosen(self, how: Reading) -> CurveTable:
        """The same table with the curves that are meant.

        Raises:
            ValueError: The file cannot be read, or has no such curves; or others were chosen.
        """
        if self.file == "auto":
            return replace(self, sha256=_digest())
        if self.path:
            made = _chosen(HeadCurves.load(self.path), how)
            return replace(made, file=self.file, sha256=checksum(Path(self.path)))
        if self.reading != how.words:
            raise ValueError(
                f"These head curves ({self.file}) are {self.reading or 'not chosen'}, and "
                f"{how.words} were asked for. Give the path of the file again, under `heads`."
            )
        return self

    def for_model(self, geometry: Geometry, how: Reading) -> CurveTable:
        """The same table; of ``auto`` the one that is shipped for the model.

        Raises:
            ValueError: None is.
        """
        if self.file != "auto":
            return self
        path = shipped_curves().get(geometry.model)
        if path is None:
            whose = f"the model {geometry.model!r}" if geometry.model else "a model without a name"
            raise ValueError(
                f"No file of head curves is shipped for {whose}, and the setting is heads: auto. "
                f"{MAKE[:-1]}, and give its path; or use a rule that needs none, uniform or "
                "pyramid."
            )
        return _of_file(path, how)

    def check(self, geometry: Geometry, transfer: bool) -> None:
        """Refuse curves of other heads, and warn of those of another model.

        Args:
            geometry: Of the model.
            transfer: Take curves that were measured with another chunk or grid.

        Raises:
            ValueError: It has other layers or heads; or, unless allowed, another chunk or grid.
        """
        own = {"layers": len(self.curve), "heads": len(self.curve[0]), "head_dim": self.head_dim}
        own |= {"grid": list(self.grid), "frames_per_chunk": self.chunk}
        check_shape(own, geometry, transfer)
        if said := self.foreign(geometry.model):
            warnings.warn(said, stacklevel=2)

    def check_cache(self, here: CacheSpec, history: int) -> None:
        """Refuse a cache that they were not measured with; what is not known is not compared.

        Args:
            here: The cache of a policy.
            history: The most history frames that a rollout has.

        Raises:
            ValueError: It holds another number of frames, or others, or may leave some out.
        """
        if self.cache and (other := self.cache.differing(here, history)):
            raise ValueError(
                f"The head curves ({self.file}) were measured with {self.cache.words(other)}, and "
                f"{here.policy!r} has {here.words(other)}. Give the policy such a cache, measure "
                "curves with its own (calibrate --reach, --reference, --sink), or allow it "
                "(transfer: true)."
            )

    def foreign(self, model: str, weights: str = "") -> str:
        """What to say where they are of another model, or of other weights of it; else nothing.

        Args:
            model: Name of the model that uses them; what is not known is not compared.
            weights: What tells its weights from others.
        """
        if self.model and model and self.model != model:
            whose, where = f"for the model {self.model!r}", f"for {model!r}"
        elif self.weights and weights and self.weights != weights:
            whose, where = f"with other weights of {self.model!r}", "here"
        else:
            return ""
        return (
            f"Head curves that were measured {whose} are used {where}. Whether they fit is an "
            "experiment: measure them for this model to be sure."
        )

    def limited(self, least: int | None, most: int | None) -> Any:
        """What a rule may look at, see :func:`~lightning_kv.policies.head_curves.limited`."""
        curve, importance = (
            torch.tensor(rows, dtype=torch.float64) for rows in (self.curve, self.importance)
        )
        return limited(self.budgets, curve, importance, least, most)


AUTO_CURVES = CurveTable(file="auto")
"""The file that is shipped for the model."""


def _chosen(curves: HeadCurves, how: Reading) -> CurveTable:
    """What a part holds of a file."""
    curve = curves.curve(how.scorer, how.metric, how.objective, how.shrink)
    model = curves.about.get("model", {})
    sizes = model.get("geometry", {})
    return CurveTable(
        curves.budgets,
        _rows(curve),
        _rows(curves.important(how.importance, curve)),
        how.words,
        model.get("name", ""),
        sizes.get("head_dim", 0),
        tuple(sizes.get("grid", ())),
        sizes.get("frames_per_chunk", 0),
        tuple(curves.about.get("data", {}).get("prompts", ())),
        model.get("fingerprint", ""),
        CacheSpec.of_file(curves.about.get("cache")),
    )


def _rows(values: Tensor) -> Rows:
    found = values.tolist()
    return tuple(tuple(tuple(x) if isinstance(x, list) else x for x in row) for row in found)


@cache
def shipped_curves() -> dict[str, Path]:
    """Files of head curves that are shipped, by the name of their model."""
    found = {}
    for path in sorted(HEADS.glob("*.safetensors")):
        found[HeadCurves.load(path).about["model"]["name"]] = path
    return found


def file_of_curves(path: str | Path, model: str = "") -> Path:
    """Where a file of head curves is.

    Args:
        path: Its path, or ``auto``: the one that is shipped for the model.
        model: Its name; where it is not known, ``auto`` is the only one that is shipped.

    Raises:
        ValueError: None is shipped, or several, and the model is not known.
    """
    if str(path) != "auto":
        return Path(path)
    shipped = shipped_curves()
    if not model and len(shipped) == 1:
        (model,) = shipped
    if model not in shipped:
        whose = f"the model {model!r}" if model else "a model without a name"
        raise ValueError(f"No head curves are shipped for {whose}. {MAKE}")
    return shipped[model]


@cache
def _digest() -> str:
    """Of all files that are shipped."""
    return hashlib.sha256("".join(map(checksum, shipped_curves().values())).encode()).hexdigest()


@lru_cache(maxsize=16)
def _of_file(path: Path, how: Reading) -> CurveTable:
    return replace(_chosen(HeadCurves.load(path), how), file=path.name, sha256=checksum(path))
