"""The run directory: what is measured is on disk clip by clip, and any run can be taken up again.

Layout::

    run.json                  schema, fingerprint, what it was made of, what a report needs
    config.yaml               the effective configuration
    records/rank-00003.jsonl  one line per clip and policy, written by that rank
    summary.json              means, intervals and costs
    videos/                   comparisons, one file per prompt; in difference/ the same with
                              the amplified difference to the reference
    traces/                   which frames were kept and read, one file per pictured prompt
    features/                 what distances between sets of clips are computed from
    report.html               all of it on one page; report.md and table.tex for other documents

A record line, JSON without NaN and Infinity (what has no value is null)::

    {"schema": 1, "policy": str, "key": str, "prompt": str, "rank": int,
     "failure": why the clip has no values | null, "problems": {metric: why it has none},
     "unit": what samples of one prompt have in common, "sample": which of them (both optional, as
     problems is: without a unit a record counts by its key),
     "noise_revision": of the rule by which the noise was drawn (rollouts only),
     "metrics": {name: float | null}, "curves": {name: [float | null, ...]},
     "cost": {"kv_bytes_peak", "kv_bytes_mean", "kv_rows_read", "kv_rows_scored",
              "kv_read_fraction", "kv_scored_fraction", "seconds_per_chunk": [float, ...]}}
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_kv.runs.derived import with_derived
from lightning_kv.utilities.files import write_atomic

Record = dict[str, Any]

SCHEMA = 1
FIELDS = ("policy", "key", "prompt", "metrics", "curves", "cost")
NAMED = 6  # differing keys that an error names

log = logging.getLogger(__name__)


class RunDirectory:
    """One evaluation on disk; several ranks append to it, each to its own file.

    Args:
        path: The directory; :meth:`open` creates it.
    """

    FOLDERS = ("records", "videos/difference", "traces")
    """What :meth:`open` makes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.summary = self.path / "summary.json"
        self.videos = self.path / "videos"
        self.differences = self.videos / "difference"
        self.traces = self.path / "traces"
        self.features = self.path / "features"
        self.report = self.path / "report.html"

    def open(
        self,
        fingerprint: str,
        described: dict[str, Any],
        about: dict[str, Any] | None = None,
        beside: Collection[str] = (),
    ) -> None:
        """Create the directory, or check that it holds this very run.

        One rank calls this before any rank appends. Nothing is written when it refuses.

        Args:
            fingerprint: Identity of the run, see :func:`fingerprint`.
            described: What the fingerprint was made of, kept to explain a mismatch.
            about: What a report needs to know without the model; without it there is none. Kept
                from the first time, and never compared.
            beside: Names in a directory that is new all the same, such as those of a logger.

        Raises:
            ValueError: The path is a file, a directory that is not ours, or holds another run.
        """
        run = {"schema": SCHEMA, "fingerprint": fingerprint, "described": described}
        text = json.dumps(run | {"about": about or {}}, indent=2, allow_nan=False) + "\n"
        if self._holds_something(beside):
            self._check(json.loads(json.dumps(run)))
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "run.json", text)
        for folder in self.FOLDERS:
            (self.path / folder).mkdir(exist_ok=True, parents=True)

    def _holds_something(self, beside: Collection[str]) -> bool:
        if not self.path.is_dir():
            return self.path.exists()
        return any(each.name not in beside for each in self.path.iterdir())

    def held(self) -> dict[str, Any]:
        """Content of ``run.json``: schema, fingerprint, described, about.

        Raises:
            ValueError: There is no run directory here.
        """
        try:
            found = json.loads((self.path / "run.json").read_bytes())
            return {name: found[name] for name in ("schema", "fingerprint", "described")} | found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is no run directory. It has no readable run.json "
                f"({type(error).__name__}: {error}). To evaluate, give a directory that is new, "
                "empty, or made by an earlier run; to report, one that `evaluate` made."
            ) from error

    def about(self) -> dict[str, Any]:
        """What :meth:`open` was told for reports.

        Raises:
            ValueError: There is no run directory here, or one that says nothing about itself.
        """
        if about := self.held().get("about"):
            return about
        raise ValueError(
            f"{self.path} says too little about itself. Its run.json has no 'about', as an older "
            "version wrote it. Evaluate again into a new directory."
        )

    def _check(self, run: dict[str, Any]) -> None:
        """Compare ``run.json`` with the run that is asked for."""
        found = self.held()
        schema, held, described = (found[name] for name in run)
        if (schema, held) == (run["schema"], run["fingerprint"]):
            return
        names = differing(described, run["described"]) or ["fingerprint"]
        there, asked = dict(leaves(found)), dict(leaves(run))
        shown = "; ".join(
            f"{name} (there {_value(there, name)}, asked {_value(asked, name)})"
            for name in names[:NAMED]
        )
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ValueError(
            f"{self.path} holds another run. These differ: {shown}{more}. "
            "Give another directory, or the settings in its run.json to take that run up again."
        )

    def append(self, rank: int, record: Record) -> None:
        """Write one record so that it survives a crash right after.

        Args:
            rank: Process that measured it; each has its own file.
            record: A record line without ``schema`` and ``rank``.

        Raises:
            ValueError: A field is missing, or a number is NaN or infinite.
        """
        if missing := [name for name in FIELDS if name not in record]:
            raise ValueError(
                f"A record is incomplete. It has {sorted(record)} and lacks {missing}. "
                f"Give all of {list(FIELDS)}."
            )
        wild = [n for n, v in leaves(record) if isinstance(v, float) and not math.isfinite(v)]
        if wild:
            raise ValueError(
                f"A record holds a number that JSON has no word for. The record of "
                f"{record['policy']!r} for {record['key']!r} is NaN or infinite in "
                f"{', '.join(wild)}. Give None where there is no value."
            )
        line = json.dumps({"schema": SCHEMA, **record, "rank": rank}, allow_nan=False)
        with (self.path / "records" / f"rank-{rank:05d}.jsonl").open("ab+") as file:
            _cut_half_line(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """Read the records of all ranks, each policy and key once.

        A clip is measured again where a crash came between two of its policies: of records with
        the same policy and key, the first counts.

        Metrics that are computed from others of the clip are added, see
        :mod:`lightning_kv.runs.derived`.

        Raises:
            ValueError: A line is damaged, or two records of one policy and key disagree.
        """
        found: dict[tuple[str, str], Record] = {}
        for path in sorted((self.path / "records").glob("rank-*.jsonl")):
            for record in _read(path):
                first = found.setdefault((record["policy"], record["key"]), record)
                if names := differing(_measured(first), _measured(record), _agree):
                    raise ValueError(
                        f"Two records of {record['policy']!r} for {record['key']!r} disagree in "
                        f"{', '.join(names[:NAMED])}. They are from ranks {first['rank']} and "
                        f"{record['rank']} of {self.path}. Evaluate again into a new directory, "
                        "on one kind of device."
                    )
        return [record | {"metrics": with_derived(record["metrics"])} for record in found.values()]

    def finished(self, policies: Iterable[str]) -> set[str]:
        """Keys for which a record of every policy is there."""
        done = {(record["policy"], record["key"]) for record in self.records()}
        wanted = list(policies)
        return {key for _, key in done if all((name, key) in done for name in wanted)}


def fingerprint(described: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of ``described``: the order of keys does not matter."""
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every value inside nested dicts and lists, with its dotted name."""
    if value and isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def differing(
    first: object, second: object, same: Callable[[Any, Any], bool] = operator.eq
) -> list[str]:
    """Dotted names of the values that are not the same, or are on one side only."""
    left, right = dict(leaves(first)), dict(leaves(second))
    names = dict.fromkeys([*left, *right])
    return [n for n in names if n not in left or n not in right or not same(left[n], right[n])]


def _value(run: dict[str, object], name: str) -> str:
    """How an error shows one described value."""
    return repr(run.get(f"described.{name}", run.get(name, "nothing")))


def _measured(record: Record) -> dict[str, Any]:
    """What has to come out the same when a clip is measured twice: all but its timing."""
    cost = {name: value for name, value in record["cost"].items() if name != "seconds_per_chunk"}
    return {"cost": cost, **{name: record[name] for name in ("prompt", "metrics", "curves")}}


def _agree(first: object, second: object) -> bool:
    """Equal but for the last digits, which another number of ranks may change."""
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
    return first == second


def _read(path: Path) -> list[Record]:
    """Records of one file; what follows the last line break was never finished."""
    *lines, half = path.read_bytes().split(b"\n")
    if half:
        log.warning(
            "%s ends in a half-written record (%d bytes), as a crash leaves it. It is ignored: "
            "its clip is not finished and is measured again when the run is taken up.",
            path,
            len(half),
        )
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse(line: bytes, place: str) -> Record:
    """One record from one whole line."""
    try:
        record = json.loads(line)
        complete = record["schema"] == SCHEMA and all(name in record for name in FIELDS)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(
            f"A record cannot be read. {place} is {line[:60]!r}. It should be a JSON object of "
            f"schema {SCHEMA} with {list(FIELDS)}: remove the line, and the clip is measured again."
        )
    return record


def _cut_half_line(file: Any) -> None:
    """Drop what a crash left after the last line break of an open file."""
    if not (size := file.seek(0, os.SEEK_END)):
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
