"""Records of clips on disk: one file for each, whole or not there.

``clips/KEY.safetensors`` holds float64 ``site/CHUNK/STEP/NAME`` and ``profile/NAME``. A file takes
its name when it is whole and on the disk, so the names of a folder say what is finished; whoever
was stopped, and wherever, leaves nothing to repair. Two ranks that measure one clip write the same.
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

SUFFIX = ".safetensors"


class CalibrationDirectory(RunDirectory):
    """A run whose records are those of :class:`~lightning_kv.calibration.clips.ClipRecord`.

    Args:
        path: The directory.
    """

    FOLDERS = ("clips",)

    def file_of(self, key: str) -> Path:
        """Where the record of a clip is, or will be."""
        return self.path / "clips" / f"{part_of_path(key)}{SUFFIX}"

    def write(self, record: ClipRecord, sample: PromptSample) -> None:
        """Keep a record.

        Args:
            record: Of a clip.
            sample: Its prompt, or its video.
        """
        tensors = {
            f"site/{chunk}/{step}/{name}": own
            for (chunk, step), site in record.sites.items()
            for name, own in site.items()
        }
        tensors |= {f"profile/{name}": own for name, own in record.profile.items()}
        told = {
            "key": record.key,
            "unit": record.unit,
            "sample": mark_of(sample),
            "validates": record.validates,
        }
        content = {name: own.contiguous() for name, own in sorted(tensors.items())}
        text = json.dumps(told, sort_keys=True)
        write_atomic(self.file_of(record.key), save(content, {"lightning_kv": text}))

    def told(self, key: str) -> dict[str, Any] | None:
        """What the record of a clip says about itself; None where there is none.

        Raises:
            ValueError: The file is damaged.
        """
        return _read(self.file_of(key), False)[0] if self.file_of(key).is_file() else None

    def read(self, key: str) -> ClipRecord:
        """The record of a clip.

        Raises:
            ValueError: The file is damaged, or not there.
        """
        told, tensors = _read(self.file_of(key), True)
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
            if told["validates"] or not asked.validates:
                done.add(key)
        return done


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a clip.

    Args:
        sample: Its prompt, or its video.
        validates: Losses measured exactly too.
    """

    sample: PromptSample
    validates: bool


def mark_of(sample: PromptSample) -> str:
    """What tells a prompt, its world and its video from others: SHA-256."""
    video = None if sample.video is None else checksum(sample.video)
    seed = sample.world_seed if video is None else 0
    return fingerprint({"prompt": sample.prompt, "world_seed": seed, "video": video})


def _read(path: Path, whole: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
