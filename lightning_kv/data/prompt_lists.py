"""Lists of prompts as people keep them (text, CSV, JSON), and captions of videos."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_kv.data.records import text_of

NAMES = ("prompt", "prompt_en", "caption", "text")  # prompt_en: VBench's full_info.json
KINDS = (".txt", ".csv", ".json")
VIDEO = "video"
Record = dict[str, Any]


def read_prompts(path: str | Path) -> list[Record]:
    """Read a list of prompts.

    Args:
        path: ``.txt``, one prompt per line, blank ones left out; ``.csv``, whose first line names
            the columns; or ``.json``, a list of texts or of objects, such as VBench's
            ``full_info.json``. The prompt is the field `prompt`, `prompt_en`, `caption` or `text`;
            other fields are carried along. UTF-8.

    Returns:
        A record for each, with the text under ``"prompt"``.

    Raises:
        ValueError: It cannot be read, it holds none, or one of them is no prompt.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise ValueError(f"There are no prompts in {path}. Given 0. Give one prompt or more.")
    return [_record(row, f"{path}, prompt {number}") for number, row in enumerate(rows, 1)]


def read_captions(
    videos: Mapping[str, Path], table: str | Path | None = None
) -> dict[str, str | None]:
    """What is written about each video of a folder.

    Args:
        videos: The videos by key, as `videos_in` finds them.
        table: ``.csv`` or ``.json`` with a field `video` (the path inside the folder, with or
            without suffix, or that of the file itself) and a prompt as in `read_prompts`, or a
            JSON object of prompts by video. None: the ``.txt`` or ``.json`` file beside each
            video, where there is one.

    Returns:
        The prompt by key; None where nothing is said.

    Raises:
        ValueError: A file cannot be read; or a table names a video that is not there, names one
            twice, or leaves one out.
    """
    if table is None:
        return {key: _beside(path) for key, path in videos.items()}
    table = Path(table)
    found: dict[str, str | None] = {}
    for number, row in enumerate(_rows(table), 1):
        where = f"{table}, line {number}"
        key = _key(row, videos, where)
        if key in found:
            raise ValueError(
                f"{where}: a video comes again. Given {key!r}. Give every video one caption."
            )
        found[key] = _record(row, where)["prompt"]
    missing = [key for key in videos if key not in found]
    if missing:
        raise ValueError(
            f"{table} leaves videos without a caption. Given {len(found)} captions for "
            f"{len(videos)} videos; {', '.join(missing[:3])} has none. Add them, or take the "
            "videos out of the folder."
        )
    return found


def _rows(path: Path) -> list[Any]:
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(
            f"{path} is no list that can be read. Given a file of type {kind!r}. Give one of "
            f"{', '.join(KINDS)}."
        )
    text = _text(path)
    if kind == ".txt":
        return [line.strip() for line in text.split("\n") if line.strip()]
    return _table(path, text) if kind == ".csv" else _json(path, text)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as text. Given {error}. Give a file in UTF-8."
        ) from error


def _table(path: Path, text: str) -> list[Record]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path} cannot be read as a table. Given {error}. Give a CSV file in UTF-8, with the "
            "names of the columns in its first line."
        ) from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {number} after the first, has another number of cells than the "
                f"first line. Given {row}. Quote a text that has commas."
            )
    return rows


def _json(path: Path, text: str) -> list[Any]:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON. Given {error}. Give a JSON list.") from error
    if isinstance(held, dict):
        held = [{VIDEO: video, "prompt": prompt} for video, prompt in held.items()]
    if not isinstance(held, list):
        raise ValueError(
            f"{path} holds no list. Given {type(held).__name__}. Give a JSON list of texts or of "
            'objects such as {"prompt": "dusk fast n13 left"}.'
        )
    return held


def _record(row: Any, where: str) -> Record:
    """A row with its prompt under the name that shards use."""
    if isinstance(row, str):
        row = {"prompt": row}
    names = [name for name in NAMES if isinstance(row, Mapping) and name in row]
    if not names:
        raise ValueError(
            f"There is no prompt. {where} is {str(row)[:200]}. Give it a field of one of the names "
            f"{', '.join(NAMES)}."
        )
    rest = {key: value for key, value in row.items() if key not in (names[0], VIDEO)}
    record = rest | {"prompt": row[names[0]]}
    text_of(record, where)
    return record


def _key(row: Any, videos: Mapping[str, Path], where: str) -> str:
    given = row.get(VIDEO) if isinstance(row, Mapping) else None
    if isinstance(given, str):
        short = Path(given).with_suffix("").as_posix() if given else ""
        for key in (given, short):
            if key in videos:
                return key
        place = Path(given).resolve()  # what `lightning-kv export` writes
        for key, video in videos.items() if given else ():
            if video.resolve() == place:
                return key
    raise ValueError(
        f"{where}: no such video. Given {given!r} in the field {VIDEO!r}. Give one of "
        f"{_some(videos)}."
    )


def _beside(video: Path) -> str | None:
    for kind in (".txt", ".json"):
        path = video.with_suffix(kind)
        if not path.is_file():
            continue
        if kind == ".txt":
            record = {"prompt": _text(path).strip()}
        else:
            record = next(iter(_json(path, f"[{_text(path)}]")))
        return _record(record, str(path))["prompt"]
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" * (len(names) > 3))
