"""Tables with one number or one word per head: shipped by name, from files, or given in place."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import safe_open as open_tensors
from safetensors.torch import load as unpack

from lightning_kv.cache.passes import Geometry
from lightning_kv.utilities.formatting import several
from lightning_kv.utilities.nearest import hint

HEADS = Path(__file__).parent / "heads"
"""Where the shipped tables are."""

ZERO = "zero"
"""Name of the importance by silencing whole heads, in files of head curves."""

Value = float | str
Rows = tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class HeadTable:
    """One number or one word per head, and the file they were read from.

    Args:
        rows: One row per layer, one number or word per head.
        file: Name of the file or of the shipped table; None where they were given in place.
        sha256: Of that file.
        auto: Names of methods, with spaces: the table that is shipped for the model at hand of the
            first that has one. Then ``sha256`` is that of all that are shipped of these methods.
    """

    rows: Rows = ()
    file: str | None = None
    sha256: str | None = None
    auto: str = ""

    @classmethod
    def of(cls, value: Any, name: str = "rows") -> HeadTable:
        """A table from what a setting may be.

        Args:
            value: Rows in place, the name of a shipped table, ``auto``, the path of a JSON file,
                or what :func:`dataclasses.asdict` made of a table.
            name: Of the setting: the key in a JSON file.

        Raises:
            ValueError: It is none of them.
        """
        if isinstance(value, HeadTable):
            return value
        if isinstance(value, str | Path):
            return cls.read(value, name)
        own = value if isinstance(value, dict) else {"rows": value}
        known = set(cls.__dataclass_fields__)
        if not isinstance(own.get("rows"), tuple | list) or own.keys() - known:
            raise ValueError(
                f"{str(value)[:60]} is no head table. Give a row per layer with one value per "
                "head, such as [[0.1, 0.9], [0.4, 0.2]], the name of a shipped table, or the path "
                "of a JSON file."
            )
        rows = (tuple(row) if isinstance(row, tuple | list) else row for row in own["rows"])
        return cls(**own | {"rows": tuple(rows)})

    @classmethod
    def read(cls, path: str | Path, name: str, folder: Path = Path()) -> HeadTable:
        """A table by its name, or from a file.

        Args:
            path: Name of a shipped table, ``auto``, or path of a file: JSON with the rows under
                the key ``name``, as authors publish it, or of head curves (:func:`rows_of`).
            name: Of the setting.
            folder: Where a path starts.

        Raises:
            ValueError: No such table, file or key, or its rows are no rows of numbers or words.
        """
        if str(path) == "auto":
            return cls(file="auto")
        named = path == Path(path).name and not Path(path).suffix[1:].isalpha()
        if isinstance(path, str) and named:
            if path not in shipped():
                raise ValueError(
                    f"No head table {path!r} is shipped.{hint(path, shipped())} Shipped: "
                    f"{', '.join(shipped())} (`lightning-kv list heads`). Or give the path of a "
                    "file (.json)."
                )
            found = shipped()[path]
            return cls(found.rows, path, hashlib.sha256(found.path.read_bytes()).hexdigest())
        return cls._from_file(folder / path, name)

    @classmethod
    def _from_file(cls, path: Path, name: str) -> HeadTable:
        wanted = (
            f'Give a JSON file such as {{"{name}": [[0.1, 0.9], [0.4, 0.2]]}}: a row per layer.'
        )
        try:
            content = path.read_bytes()
            rows = tuple(tuple(map(_value, row)) for row in rows_of(content, path.suffix, name))
        except FileNotFoundError:
            raise ValueError(f"No head table at {str(path)!r}. {wanted}") from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{str(path)!r} is no head table: {type(error).__name__}: {error}. {wanted}"
            ) from error
        return cls(rows, path.name, hashlib.sha256(content).hexdigest())

    @property
    def values(self) -> tuple[Value, ...]:
        """Each value that occurs, once; of an ``auto`` table those of all that it may mean."""
        every = [own.rows for own in shipped_of(self.auto)]
        rows = [row for own in (every if self.auto else [self.rows]) for row in own]
        return tuple(sorted({value for row in rows for value in row}, key=lambda x: (str(x), x)))

    def numbered(self, part: str, name: str, low: float | None = None) -> HeadTable:
        """The same table, if it is one of finite numbers.

        Args:
            part: Name of the budget part; with ``auto``, of the method whose tables are meant.
            name: Of the setting.
            low: Smallest number that makes sense.

        Raises:
            ValueError: It is empty or flat, or holds something else than such numbers.
        """
        if self.file == "auto":
            return HeadTable((), "auto", _digest(part), part)
        rows = [row if isinstance(row, tuple | list) else (None,) for row in self.rows]
        values = [value for row in rows for value in row]
        fine = [
            isinstance(x, int | float) and math.isfinite(x) and (low is None or x >= low)
            for x in values
        ]
        if not fine or not all(fine):
            floor = "" if low is None else f" from {low:g}"
            raise ValueError(
                f"The budget part {part!r} needs `{name}`: finite numbers{floor}, a row per layer "
                "and one number per head, the name of a shipped table, or the path of a JSON file. "
                f"Given: {str(self.rows)[:60]}."
            )
        return self

    def labelled(self, part: str, name: str, kinds: Mapping[str, int] | Sequence[str]) -> HeadTable:
        """The same table in words.

        Args:
            part: Name of the part; with ``auto``, of the method whose tables are meant.
            name: Of the setting.
            kinds: The words, each with the number that may stand for it; in their order, from 0,
                where none are given.

        Raises:
            ValueError: It is empty or flat, or holds something else than these.
        """
        if self.file == "auto":
            return HeadTable((), "auto", _digest(part), part)
        numbers = dict(kinds) if isinstance(kinds, Mapping) else {w: i for i, w in enumerate(kinds)}
        words = {word: word for word in numbers} | {own: word for word, own in numbers.items()}
        rows = [row if isinstance(row, tuple | list) else (None,) for row in self.rows]
        found = tuple(tuple(words.get(_whole(value)) for value in row) for row in rows)
        if not found or any(word is None for row in found for word in row):
            told = ", ".join(f"{word} ({number})" for word, number in numbers.items())
            raise ValueError(
                f"The part {part!r} needs `{name}`: a row per layer and one of {told} per head, "
                "the name of a shipped table, auto (the one shipped for the model), or the path of "
                f"a file. Given: {str(self.rows)[:60]}."
            )
        return HeadTable(found, self.file, self.sha256)

    def rows_for(self, geometry: Geometry) -> Rows:
        """The rows; of an ``auto`` table those shipped for the model.

        Raises:
            ValueError: None is.
        """
        if not self.auto:
            return self.rows
        for own in shipped_of(self.auto):
            if geometry.model in own.models:
                return own.rows
        whose = f"the model {geometry.model!r}" if geometry.model else "a model without a name"
        named = " or ".join(map(repr, self.auto.split()))
        raise ValueError(
            f"No head table of {named} is shipped for {whose}, and the setting is auto. "
            f"{_way(self.auto, geometry)}"
        )

    def check_heads(self, geometry: Geometry, what: str, method: str | None = None) -> None:
        """Refuse a table of another model.

        Args:
            geometry: Of the model.
            what: What the table is called.
            method: Whose shipped tables would do; this one's own where not given.

        Raises:
            ValueError: It has another shape than the model, or is ``auto`` and there is none.
        """
        rows = self.rows_for(geometry)
        shape = [len(row) for row in rows]
        if shape != [geometry.heads] * geometry.layers:
            widths = ", ".join(map(str, sorted(set(shape)))) or "no"
            whose = f" ({self.file})" if self.file else ""
            method = method or self.auto or getattr(shipped().get(self.file), "method", "")
            raise ValueError(
                f"The {what}{whose} has {len(shape)} rows of {widths} heads: it was made for "
                f"another model. This one has {geometry.layers} layers of {geometry.heads} heads. "
                f"{_way(method, geometry)}"
            )


NO_TABLE = HeadTable()
"""Not given yet."""

AUTO = HeadTable(file="auto")
"""The table that is shipped for the model."""


@dataclass(frozen=True)
class Shipped:
    """A table in :data:`HEADS`, and what its file says of it.

    Args:
        rows: One row per layer.
        method: Preset or part that it is for.
        models: Names of the models whose heads it describes.
        about: What the numbers or words are, in a sentence.
        source: Where they are from.
        path: Of the file.
    """

    rows: Rows
    method: str
    models: tuple[str, ...]
    about: str
    source: str
    path: Path


@cache
def shipped() -> dict[str, Shipped]:
    """Every shipped table, by name; of a file of head curves the importance."""
    found = {}
    for path in sorted(HEADS.glob("*.json")):
        own = json.loads(path.read_text("utf-8"))
        if "method" not in own:  # what a file of head curves says of itself
            continue
        told = (own["method"], tuple(own["model"]), own["about"], own["source"])
        key = next(key for key, value in own.items() if isinstance(value, list) and key != "model")
        found[path.stem] = Shipped(tuple(tuple(map(_value, row)) for row in own[key]), *told, path)
    for path in sorted(HEADS.glob("*.safetensors")):
        found[path.stem] = _curves(path)
    return found


def _curves(path: Path) -> Shipped:
    """Of a shipped file of head curves the importance; curves wait until they are asked for."""
    with open_tensors(path, "pt") as file:
        told = json.loads(file.metadata()["lightning_kv"])
        budgets = file.get_tensor("grid/budget").tolist()
        rows = tuple(map(tuple, file.get_tensor(f"importance/{ZERO}").tolist()))
        names = [key[7:] for key in file.keys() if key.startswith("prompt/")]  # noqa: SIM118
    about = (
        f"What heads lose with {budgets[0]} to {budgets[-1]} frames ({', '.join(sorted(names))}), "
        "for budgets by head (part calibrated, heads: auto); and their importance, the loss "
        "without the whole head."
    )
    source = f"lightning-kv calibrate, {several(len(told['data']['prompts']), 'prompt')}"
    return Shipped(rows, "importance", (told["model"]["name"],), about, source, path)


def shipped_of(methods: str) -> list[Shipped]:
    """The tables that are shipped of some methods, those of the first named first.

    Args:
        methods: Names, with spaces.
    """
    return [own for name in methods.split() for own in shipped().values() if own.method == name]


@cache
def _digest(methods: str) -> str:
    """Of all tables that are shipped of some methods."""
    every = b"".join(own.path.read_bytes() for own in shipped_of(methods))
    return hashlib.sha256(every).hexdigest()


def _way(method: str, geometry: Geometry) -> str:
    """What to do without a table for a model."""
    shape = [geometry.heads] * geometry.layers
    fit = [
        name
        for name, own in shipped().items()
        if own.method in method.split() and [len(row) for row in own.rows] == shape
    ]
    shown = f"{', '.join(fit)} (`lightning-kv list heads`)"
    named = f"Shipped and of this shape: {shown}. Or give" if fit else "Give"
    return f"{named} one value for each head, in place or in a JSON file."


def rows_of(content: bytes, suffix: str, name: str) -> list[list[Any]]:
    """Rows of a file, in the formats that authors publish.

    Args:
        content: Of the file. ``.csv`` and ``.tsv``: a line per layer, a number per head
            (Pyramid-Forcing, DuoAttention). JSON: rows under the key ``name``, or a list, perhaps
            under ``layers``, of ``layer_idx`` with ``static_head`` and ``dynamic_head``, in older
            files ``local_head`` and ``temporal_head`` (Forcing-KV). ``.safetensors``: head curves,
            whose importance is the loss with the whole head silenced, as Focused Forcing has it.
        suffix: Of its name.
        name: Key of the rows.

    Raises:
        ValueError: Its layers do not name each head once, or these head curves have no such rows.
    """
    if suffix == ".safetensors":
        found = unpack(content).get(f"{name}/{ZERO}")
        if found is None:
            raise ValueError(
                f"it has no {name}/{ZERO}. Of a file of head curves `importance` can be read, if "
                "prompts validated (calibrate --validate 4); labels are in the folder beside it"
            )
        return found.tolist()
    if suffix in (".csv", ".tsv"):
        lines = content.decode().split("\n")
        return [[float(x) for x in re.split(r"[,\t]", line)] for line in lines if line.strip()]
    found = json.loads(content)
    layers = found.get("layers", found) if isinstance(found, dict) else found
    if not (isinstance(layers, list) and layers and isinstance(layers[0], dict)):
        return found[name]
    old, new = ("local_head", "temporal_head"), ("static_head", "dynamic_head")
    keys = new if new[0] in layers[0] else old
    of = {own["layer_idx"]: tuple(own[key] for key in keys) for own in layers}
    heads = sum(map(len, next(iter(of.values()))))
    for layer, (static, dynamic) in of.items():
        if sorted(static + dynamic) != list(range(heads)):
            raise ValueError(f"layer {layer} does not name each of {heads} heads once")
    rows = [of.get(layer, ((), ()))[0] for layer in range(max(of) + 1)]
    return [["static" if h in own else "dynamic" for h in range(heads)] for own in rows]


def _value(value: Any) -> Value:
    """A word as it is, and everything else as a number."""
    return value if isinstance(value, str) else float(value)


def _whole(value: Any) -> Any:
    """A whole number as an int, everything else as it is; nothing of what cannot be looked up."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
