"""A loader whose workers speak as the process does that reads by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from lightning_kv.utilities.errors import said_by

Batch = TypeVar("Batch", covariant=True)


class Loader(DataLoader[Batch]):
    """torch's, but a ValueError of a worker says what it said there, without a traceback."""

    def __iter__(self) -> Iterator[Any]:
        """Batches in their order.

        Raises:
            ValueError: What the data raised, of the same class.
        """
        try:
            yield from super().__iter__()
        except ValueError as error:
            if (text := said_by(error)) == str(error):
                raise
            raise type(error)(text) from None
