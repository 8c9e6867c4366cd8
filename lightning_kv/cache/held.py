"""How many bytes are held: all distinct storages that can be reached."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def reachable_bytes(*roots: Any) -> int:
    """Bytes of all distinct storages reachable from objects, containers, dataclasses, modules."""
    seen: dict[int, int] = {}
    visited: set[int] = set()
    stack: list[Any] = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        else:
            stack.extend(_children(item))
    return sum(seen.values())


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, list | tuple | set | frozenset | deque):
        return item
    if isinstance(item, nn.Module):
        return [*item.parameters(), *item.buffers()]
    if is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, f.name) for f in fields(item)]
    return vars(item).values() if hasattr(item, "__dict__") and not callable(item) else ()
