"""Records: what the JSON of a sample says about it, above all its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LONGEST = 16 * 2**10  # bytes of a prompt: text encoders read some hundred words


def as_json(record: Mapping[str, Any]) -> bytes:
    """A record as a shard holds it: its fields sorted.

    Raises:
        ValueError: There is something in it that JSON in UTF-8 has no word for.
    """
    try:
        return json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"A record cannot be written as JSON. Given {str(record)[:200]} ({error}). Give texts, "
            "finite numbers, lists and objects."
        ) from error


def record_of(content: bytes, where: str) -> Any:
    """What the JSON of a sample holds.

    Raises:
        ValueError: It is no JSON in UTF-8.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The record of a sample is no JSON in UTF-8. {where} begins with {content[:40]!r} "
            f'({error}). Each record looks like {{"prompt": "dusk fast n13 left"}}.'
        ) from error


def text_of(record: Any, where: str, needed: bool = True) -> str:
    """The prompt of a record; its field may be called ``"caption"`` as well.

    Raises:
        ValueError: It has none although it must, or a prompt that nothing can read.
    """
    fields = record if isinstance(record, Mapping) else {}
    text = fields.get("prompt", fields.get("caption"))
    if text is None and not needed and isinstance(record, Mapping):
        return ""
    if not isinstance(text, str) or (needed and not text.strip()):
        raise ValueError(
            f"A sample holds no prompt. {where} has the record {str(record)[:200]}. "
            'Each record looks like {"prompt": "dusk fast n13 left"}; more fields may follow.'
        )
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A prompt is no text that can be written. {where} has {text[:40]!r} ({error}). Give "
            "text in UTF-8, without halves of surrogate pairs."
        ) from error
    if size > LONGEST:
        raise ValueError(
            f"A prompt is too long. {where} has one of {size} bytes, {text[:40]!r} and so on. "
            f"Give {LONGEST} bytes at most; text encoders read some hundred words."
        )
    return text
