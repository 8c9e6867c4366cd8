"""Records of clips on disk: one file for each, whole or not there.

A file ``clips/KEY.safetensors`` takes its name when it is whole and on the disk, so the names of a
folder say what is finished; whoever was stopped, and wherever, leaves nothing to repair. Two ranks
that measure one clip write the same. Those of a calibration hold float64 ``site/CHUNK/STEP/NAME``
and ``profile/NAME``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.data.datamodule import PromptSample
from lightning_kv.runs.directory import RunDirectory, fingerprint
from lightning_kv.runs.features import part_of_path
from lightning_kv.utilities.files import checksum, write_atomic
from lightning_kv.utilities.formatting import several

SUFFIX = ".safetensors"


class ClipDirectory(RunDirectory):
    """A run whose records are a file for each clip.

    Args:
        path: The directory.
    """

    FOLDERS = ("clips",)

    def file_of(self, key: str) -> Path:
        """Where the record of a clip is, or will be."""
        return self.path / "clips" / f"{part_of_path(key)}{SUFFIX}"

    def tensors_of(self, record: Any) -> dict[str, Tensor]:
        """What of a record is tensors, by name."""
        raise NotImplementedError

    def about_of(self, record: Any) -> dict[str, Any]:
        """What else a record says, plain data."""
        return {}

    def serves(self, told: Mapping[str, Any], asked: Wanted) -> bool:
        """Whether a record of a clip holds what is wanted of it."""
        return bool(told["validates"]) or not asked.validates

    def write(self, record: Any, sample: PromptSample) -> None:
        """Keep a record.

        Args:
            record: Of a clip: has ``key``, ``unit`` and ``validates``.
            sample: Its prompt, or its video.
        """
        told = {
            "key": record.key,
            "unit": record.unit,
            "sample": mark_of(sample),
            "validates": record.validates,
            **self.about_of(record),
        }
        tensors = self.tensors_of(record)
        content = {name: own.contiguous() for name, own in sorted(tensors.items())}
        text = json.dumps(told, sort_keys=True)
        write_atomic(self.file_of(record.key), save(content, {"lightning_kv": text}))

    def told(self, key: str) -> dict[str, Any] | None:
        """What the record of a clip says about itself; None where there is none.

        Raises:
            ValueError: The file is damaged.
        """
        return read_record(self.file_of(key), False)[0] if self.file_of(key).is_file() else None

    def finished(self, wanted: Mapping[str, Wanted]) -> set[str]:
        """Keys of clips whose record is there, and holds all that is wanted of it.

        Raises:
            ValueError: A file is damaged, or that of another clip.
        """
        done = set()
        for key, asked in wanted.items():
            if (told := self.told(key)) is None:
                continue
            if told["sample"] != mark_of(asked.sample):
                raise ValueError(
                    f"{self.file_of(key)} is the record of another clip that is called {key!r}: "
                    "its prompt, world or video was another one. Give these prompts other names, "
                    "or another directory."
                )
            if self.serves(told, asked):
                done.add(key)
        return done


class CalibrationDirectory(ClipDirectory):
    """A run whose records are those of :class:`~lightning_kv.calibration.clips.ClipRecord`."""

    def tensors_of(self, record: ClipRecord) -> dict[str, Tensor]:
        """What was measured at the sites, and the profile."""
        tensors = {
            f"site/{chunk}/{step}/{name}": own
            for (chunk, step), site in record.sites.items()
            for name, own in site.items()
        }
        return tensors | {f"profile/{name}": own for name, own in record.profile.items()}

    def read(self, key: str) -> ClipRecord:
        """The record of a clip.

        Raises:
            ValueError: The file is damaged, or not there.
        """
        told, tensors = read_record(self.file_of(key))
        sites: dict[tuple[int, int], dict[str, Tensor]] = {}
        profile = {}
        for name, own in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "profile":
                profile[rest] = own
            else:
                chunk, step, what = rest.split("/", 2)
                sites.setdefault((int(chunk), int(step)), {})[what] = own
        return ClipRecord(told["key"], told["unit"], sites, profile)

    def measured(self, wanted: Mapping[str, Wanted]) -> list[ClipRecord]:
        """All records that are asked for and there, by key.

        Raises:
            ValueError: A record is damaged, or no clip has one.
        """
        done = sorted(self.finished(wanted))
        if not done:
            raise ValueError(
                f"Nothing is measured so far: {self.path} has no record of any of "
                f"{several(len(wanted), 'clip')}. Run the same command again."
            )
        return list(map(self.read, done))


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a clip.

    Args:
        sample: Its prompt, or its video.
        validates: Whether it validates: see the module.
    """

    sample: PromptSample
    validates: bool


def mark_of(sample: PromptSample) -> str:
    """What tells a prompt, its world and its video from others: SHA-256."""
    video = None if sample.video is None else checksum(sample.video)
    seed = sample.world_seed if video is None else 0
    return fingerprint({"prompt": sample.prompt, "world_seed": seed, "video": video})


def read_record(path: Path, whole: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a record says about itself, and its tensors.

    Args:
        path: Of the file.
        whole: Also read tensors.

    Raises:
        ValueError: The file is damaged, or not there.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["lightning_kv"])
            names = file.keys() if whole else ()
            return told, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The record {path} cannot be read: {type(error).__name__}: {error}. Remove the file, "
            "and its clip is measured again."
        ) from error
