"""Lists of clips on disk: one file for each clip and round, whole or not there.

A file ``clips/KEY.safetensors`` holds the tensors of a clip's lists by name
(:class:`~lightning_kv.distillation.lists.Lists`), with all features that there are, and as JSON
under ``lightning_kv`` what it is: key, unit, whether its prompt is held out, budget, chunks, and as
``made`` teacher, labels, round, names and mark of the features, layers and heads of the model, and
the mark of the scorer that decided. So a file is a shard that describes itself: to fit a student
takes these files and no video model. They may be moved, and those of several machines put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.distillation.clips import ClipLists
from lightning_kv.distillation.lists import Lists, concatenated
from lightning_kv.policies.scorer.features import FEATURES, feature_hash
from lightning_kv.tasks.calibration.records import ClipDirectory, Wanted, read_record
from lightning_kv.utilities.formatting import several

TENSORS = tuple(own.name for own in fields(Lists) if own.name != "clip")
"""What a file holds of lists: the number of a clip is that of its place among those read."""


class ListDirectory(ClipDirectory):
    """A round's records, of which each is a :class:`~lightning_kv.distillation.clips.ClipLists`.

    Args:
        path: The directory.
        made: What all of its records say of how they were made.
    """

    def __init__(self, path: str | Path, made: Mapping[str, Any] | None = None) -> None:
        super().__init__(path)
        self.made = dict(made or {})

    def tensors_of(self, record: ClipLists) -> dict[str, Tensor]:
        """Those of the lists; none where nothing had to be dropped."""
        found = {name: getattr(record.lists, name, None) for name in TENSORS}
        return {name: own for name, own in found.items() if own is not None}

    def about_of(self, record: ClipLists) -> dict[str, Any]:
        """What it is."""
        return {"budget": record.budget, "chunks": record.chunks, "made": self.made}

    def serves(self, told: Mapping[str, Any], asked: Wanted) -> bool:
        """Clips of held-out prompts are rolled out otherwise than others."""
        return bool(told["validates"]) == asked.validates


@dataclass(frozen=True, eq=False)
class Decided:
    """Lists of some clips.

    Args:
        lists: Of all of them; None where there are none.
        clips: Number of clips.
        made: How the records were made.
    """

    lists: Lists | None
    clips: int
    made: dict[str, Any]


def read_lists(
    folder: str | Path, held_out: bool | None = None, keys: Iterable[str] | None = None
) -> Decided:
    """Lists of the records of a round, clip by clip in the order of their names.

    Args:
        folder: Of the round.
        held_out: Those of held-out prompts alone, or of the others; all where None.
        keys: Of the clips that count; all where None.

    Raises:
        ValueError: There are none, one is damaged, they were made in different ways, or their
            features are defined otherwise here.
    """
    files = sorted((Path(folder) / "clips").glob("*.safetensors"))
    wanted, found, made, clips = None if keys is None else set(keys), [], {}, 0
    for file in files:
        told, _ = read_record(file, False)
        check_made(file, told.get("made", {}))
        if wanted is not None and told["key"] not in wanted:
            continue
        check_alike(folder, made or told["made"], told["made"])
        made = told["made"]
        if held_out is not None and bool(told["validates"]) != held_out:
            continue
        _, tensors = read_record(file)
        if tensors:
            clip = torch.full_like(tensors["layer"], clips)
            found.append(Lists(**tensors, clip=clip))
        clips += 1
    if not made:
        raise ValueError(
            f"{folder} has no records of clips: {several(len(files), 'file')} in its folder clips, "
            "none of them asked for. Give the folder of a round that `lightning-kv distill` made."
        )
    return Decided(concatenated(found) if found else None, clips, made)


def check_alike(
    where: Any, first: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str] = ()
) -> None:
    """Refuse records that were made in different ways.

    Args:
        where: They are.
        first: How some were made.
        other: How others were.
        names: Of the settings that must be alike; all where empty.

    Raises:
        ValueError: Names the first setting that is not.
    """
    for name in names or sorted(first.keys() | other.keys()):
        if first.get(name) != other.get(name):
            raise ValueError(
                f"Records in {where} were made in different ways: {name} is "
                f"{first.get(name, 'not told')} of some and {other.get(name, 'not told')} of "
                "others. Put those together that were made with the same settings."
            )


def check_made(file: Path, made: Mapping[str, Any]) -> None:
    """Refuse records that are none of lists, or whose features are something else by now.

    Raises:
        ValueError: They are.
    """
    own = feature_hash(tuple(FEATURES))
    if made.get("feature_hash") != own:
        raise ValueError(
            f"The record {file} holds other features than this version has: "
            f"{made.get('feature_hash', 'none')}, not {own}. Collect it again into another folder "
            "(--records), or use the version that it was made with."
        )
