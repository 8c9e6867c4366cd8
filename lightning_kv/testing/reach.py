"""What can be reached from a session and from a part, and whether it has changed."""

from __future__ import annotations

import gc
import sys
from collections import deque
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.part import Part
from lightning_kv.policies.plugins import BASES

CONTAINERS = (dict, list, set, deque)


def tensors_of(*roots: Any) -> list[Tensor]:
    """Every tensor that Python's garbage collector can reach from objects.

    Functions count for what they close over; types, modules and what tensors hold do not count.
    """
    found, visited, stack = [], set(), list(roots)
    while stack:
        item = stack.pop()
        if id(item) in visited or isinstance(item, type | ModuleType):
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, FunctionType):
            stack += [cell.cell_contents for cell in item.__closure__ or ()]
        else:
            stack += gc.get_referents(item)
    return found


def bytes_of(*roots: Any) -> int:
    """Bytes of all distinct storages that can be reached from objects."""
    found = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors_of(*roots)}
    return sum(storage.nbytes() for storage in found.values())


def footprint(part: Part) -> list[str]:
    """What a part could remember outside its state: in itself, in its class, in its module."""
    found = [repr(vars(part))]
    for cls in type(part).__mro__:
        if cls is Part or cls is object:
            break
        if cls.__module__ in BASES:  # they hold the registry, in which others write
            continue
        own = {k: v for k, v in vars(cls).items() if not callable(v) and not k.startswith("__")}
        found.append(repr({k: v for k, v in own.items() if k != "_abc_impl"}))
        known = vars(sys.modules[cls.__module__])
        kept = {k: v for k, v in known.items() if isinstance(v, CONTAINERS) and k[:2] != "__"}
        found.append(repr(kept))
    return found


def held_tensors(session: CacheSession, namespace: str | None = None) -> dict[Any, Tensor]:
    """Clones of every field, key and value that a session holds (in one namespace), by name."""
    found = {}
    for cache in session.samples:
        for name in cache.stores if namespace is None else (namespace,):
            for layer, store in enumerate(cache.stores.get(name, ())):
                for kind, rows in (("memory", store.memory), ("archive", store.archive)):
                    for group in rows.groups:
                        own = {key: group.payload(key) for key in ("k", "v")} | group.meta
                        where = (cache.index, name, layer, kind, tuple(group.heads))
                        found |= {(*where, key): x.clone() for key, x in own.items()}
    return found


def state_tensors(session: CacheSession) -> dict[Any, Tensor]:
    """Clones of every tensor that parts remember, by number."""
    found = tensors_of([cache.states for cache in session.samples])
    return {i: x.clone() for i, x in enumerate(found)}


def unchanged(before: dict[Any, Tensor], after: dict[Any, Tensor], who: str) -> None:
    """Refuse other rows, or other numbers in them.

    Raises:
        AssertionError: Says where.
    """
    assert before.keys() == after.keys(), f"{who} has changed which rows are held"
    for name, old in before.items():
        assert old.equal(after[name]), f"{who} has changed {name}"
