"""Which videos a comparison is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_kv.data.pairs import Alignment, Pairs, pair_csv, pair_folders, videos_in
from lightning_kv.data.videos import SUFFIXES, VideoError, VideoInfo
from lightning_kv.report.entries import run_names
from lightning_kv.tasks.options import CompareOptions

Infos = Mapping[Path, "VideoInfo | VideoError"]
"""What every file holds, or why it cannot be read."""


@dataclass(frozen=True)
class Clip:
    """Videos that are compared with each other.

    Args:
        key: Their name in results.
        prompt: The text that they were made from; empty where unknown.
        reference: The video that is right; None where sets alone are compared.
        candidates: The videos that are judged, by candidate.
    """

    key: str
    prompt: str
    reference: Path | None
    candidates: Mapping[str, Path]


@dataclass(frozen=True)
class Videos:
    """All videos of a comparison.

    Args:
        reference: Name of the reference.
        candidates: Names of the candidates.
        clips: Ordered by key.
        notes: What has no partner, in sentences.
    """

    reference: str
    candidates: tuple[str, ...]
    clips: tuple[Clip, ...]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, dict[str, Path]]:
        """Paths by name and key."""
        found: dict[str, dict[str, Path]] = {self.reference: {}}
        for clip in self.clips:
            if clip.reference is not None:
                found[self.reference][clip.key] = clip.reference
            for name, path in clip.candidates.items():
                found.setdefault(name, {})[clip.key] = path
        return found


def find_videos(options: CompareOptions) -> Videos:
    """The videos of two folders or more, or of a table of pairs.

    Raises:
        ValueError: Both or neither are given, a folder twice, or there is nothing to compare.
    """
    folders = [*([options.reference] if options.reference else []), *options.candidates]
    if options.pairs is not None:
        if folders or options.unpaired:
            raise ValueError(
                f"--pairs {options.pairs} says what is compared, and so do "
                f"{', '.join(map(str, folders)) or '--unpaired'}. Give one or the other."
            )
        return joined("reference", {"candidate": pair_csv(options.pairs)})
    if len(folders) < 2:
        raise ValueError(
            f"Nothing to compare: {len(folders)} folder was given. Give the folder of the "
            "reference and one candidate or more, or --pairs FILE.csv."
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            f"A folder is given twice: {', '.join(map(str, folders))}. Give each once."
        )
    names = run_names(folders)
    if options.unpaired:
        return apart(names, folders)
    pairs = {
        name: pair_folders(folders[0], folder)
        for name, folder in zip(names[1:], folders[1:], strict=True)
    }
    return joined(names[0], pairs)


def joined(reference: str, pairs: Mapping[str, Pairs]) -> Videos:
    """Pairs of several candidates, by key."""
    keys = sorted({pair.key for each in pairs.values() for pair in each.pairs})
    by_key = {name: {pair.key: pair for pair in each.pairs} for name, each in pairs.items()}
    clips = []
    for key in keys:
        found = {name: own[key] for name, own in by_key.items() if key in own}
        first = next(iter(found.values()))
        paths = {name: pair.candidate for name, pair in found.items()}
        clips.append(Clip(key, first.prompt, first.reference, paths))
    notes = [
        f"{len(alone)} videos of {whose} have no partner in {other} and are left out: "
        f"{', '.join(alone[:3])}{' ...' if len(alone) > 3 else ''}."
        for name, each in pairs.items()
        for alone, whose, other in (
            (each.reference_alone, reference, name),
            (each.candidate_alone, name, reference),
        )
        if alone
    ]
    return Videos(reference, tuple(pairs), tuple(clips), tuple(notes))


def apart(names: Sequence[str], folders: Sequence[Path]) -> Videos:
    """Folders without pairs: every video for itself, under a key that names its folder.

    Raises:
        ValueError: A folder has no videos.
    """
    clips = []
    for name, folder in zip(names, folders, strict=True):
        found = videos_in(folder)
        if not found:
            raise ValueError(
                f"There are no videos in {folder}. Give a folder of {', '.join(SUFFIXES)} files."
            )
        for key, path in sorted(found.items()):
            own = {} if name == names[0] else {name: path}
            first = path if name == names[0] else None
            clips.append(Clip(f"{name}/{key}", "", first, own))
    return Videos(names[0], tuple(names[1:]), tuple(clips))


def alignable(clip: Clip, infos: Infos, alignment: Alignment) -> dict[str, VideoInfo]:
    """Candidates of a clip that can be compared with its reference, by name."""
    reference = infos.get(clip.reference)
    found: dict[str, VideoInfo] = {}
    for name, path in clip.candidates.items():
        info = infos[path]
        if not (isinstance(reference, VideoInfo) and isinstance(info, VideoInfo)):
            continue
        try:
            alignment.check(reference, info)
        except VideoError:  # its record says so
            continue
        found[name] = info
    return found


def shortest(clip: Clip, infos: Infos, alignment: Alignment) -> int | None:
    """Frames that all videos of a clip are cut to; None where each is taken whole.

    The reference is cut with its candidates, and all of them alike: differences and sets would
    compare other stretches of time otherwise.
    """
    able = alignable(clip, infos, alignment)
    if alignment.length != "shortest" or not able:
        return None
    return min(info.frames for info in (infos[clip.reference], *able.values()))
