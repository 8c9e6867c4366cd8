"""Distances between sets of clips: features on disk, and what they come to.

``features/policies/POLICY/KEY.npz`` and ``features/real/KEY.npz`` hold, by the name of an encoder,
float32 ``[windows, d]``: what it makes of the consecutive windows of a clip. How names become those
of files says :func:`part_of_path`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_kv.data.pairs import videos_in
from lightning_kv.data.videos import SUFFIXES, VideoError, read
from lightning_kv.metrics.backbones import Backbone
from lightning_kv.metrics.frechet import measurable
from lightning_kv.metrics.frechet_difference import delta_frechet
from lightning_kv.metrics.suite import Suite, set_metric
from lightning_kv.metrics.windows import Windows
from lightning_kv.runs.directory import RunDirectory, write_atomic

log = logging.getLogger(__name__)

Rows = tuple[Tensor, list[str]]
"""Features ``[n, d]``, and the prompt key of each."""


def part_of_path(name: str) -> str:
    """The name of a policy or clip as part of a path; names that differ stay apart.

    >>> part_of_path("top-attention@9f"), part_of_path("a/b")
    ('top-attention@9f', 'a_b-c14cddc0')
    """
    plain = re.sub(r"^\.+|[^\w@.+-]+", "_", name)[:100]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def policy_folder(run: RunDirectory, policy: str) -> Path:
    """Where the features of a policy are."""
    return run.features / "policies" / part_of_path(policy)


def real_folder(run: RunDirectory) -> Path:
    """Where the features of the real set are."""
    return run.features / "real"


def write_features(folder: Path, key: str, features: Mapping[str, Tensor]) -> None:
    """Keep the features of a clip; nothing is written where there are none."""
    if not features:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez(file, **{name: each.numpy() for name, each in features.items()})
    write_atomic(_file(folder, key), file.getvalue())


def featured(folder: Path, key: str) -> bool:
    """Whether the features of a clip are there."""
    return _file(folder, key).is_file()


def _file(folder: Path, key: str) -> Path:
    return folder / f"{part_of_path(key)}.npz"


def read_features(folder: Path, encoder: str) -> Rows:
    """Features of all clips of a folder, in the order of their files, whose names tell them apart.

    Raises:
        ValueError: A file is damaged.
    """
    found, keys = [], []
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = torch.from_numpy(file[encoder])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as features of {encoder} ({type(error).__name__}: {error})."
                " Remove it, and take the run up again."
            ) from error
        found.append(rows)
        keys += [path.stem] * len(rows)
    return (torch.cat(found) if found else torch.empty(0, 0)), keys


def real_videos(folder: Path | None, suite: Suite) -> dict[str, Path]:
    """The videos of ``--real`` by their key; none without a folder.

    A shard, a tar file of videos, gives a key ``SHARD::NAME`` for each, and its own path.

    Raises:
        ValueError: There are none in the folder, two of one name, or no metric looks at them.
    """
    if folder is None:
        return {}
    if not any(choice.of_sets for choice in suite.choices.values()):
        raise ValueError(
            f"--real {folder} does nothing: no metric compares sets. Leave it out, or name one: "
            "--metrics [fvd/i3d]."
        )
    found = videos_in(folder)
    for shard in sorted(folder.rglob("*.tar")):
        with tarfile.open(shard) as content:
            names = [member.name for member in content if member.isfile()]
        key = shard.relative_to(folder).with_suffix("").as_posix()
        videos = (name for name in names if Path(name).suffix.lower() in SUFFIXES)
        found |= {f"{key}::{name}": shard for name in videos}
    if found:
        return found
    raise ValueError(
        f"There are no videos in --real {folder}. Give a folder of {', '.join(SUFFIXES)} files, or "
        "of .tar shards that hold some."
    )


def read_real(
    run: RunDirectory, videos: Mapping[str, Path], encoders: Mapping[str, Backbone]
) -> list[str]:
    """Show real videos to the encoders and keep what they say.

    Returns:
        What was left out, and why: videos that are damaged, or too short for a window.

    Raises:
        ValueError: Nothing is left.
    """
    skipped = []
    for key, path in videos.items() if encoders else ():
        if featured(real_folder(run), key):
            continue
        windows = {name: Windows(encoder) for name, encoder in encoders.items()}
        try:
            with on_disk(key, path) as file:
                for block in read(file):
                    for each in windows.values():
                        each.add(block.float() / 255)
        except VideoError as error:
            skipped.append(f"real {key}: {error}")
            continue
        found = {name: each.features() for name, each in windows.items()}
        if not all(len(rows) for rows in found.values()):
            longest = max(each.length for each in windows.values())
            skipped.append(f"real {key}: shorter than a window of {longest} frames")
            continue
        write_features(real_folder(run), key, found)
    for why in skipped:
        log.warning("Skipped: %s", why)
    if skipped and not any(real_folder(run).glob("*.npz")):
        raise ValueError(
            f"None of {len(videos)} real videos can be used. {skipped[0]}. Give others to --real."
        )
    return skipped


@contextmanager
def on_disk(key: str, path: Path) -> Iterator[Path]:
    """A video as a file of its own: itself, or a copy of what a shard holds."""
    if path.suffix != ".tar":
        yield path
        return
    name = key.partition("::")[2]
    with tarfile.open(path) as shard, TemporaryDirectory() as place:
        copy = Path(place) / f"video{Path(name).suffix}"
        copy.write_bytes(shard.extractfile(name).read())
        yield copy


def distances(
    run: RunDirectory,
    metrics: Mapping[str, Mapping[str, Any]],
    policies: Collection[str],
    reference: str,
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the metrics of sets say about every policy.

    The clips of a policy are compared with the real set; where there is none, with the clips of
    the reference, which itself has no value then.

    Args:
        run: Where features are.
        metrics: What is known about each metric of sets, see ``Suite.facts``.
        policies: Their names.
        reference: The policy that others are compared with.

    Returns:
        Policy, then metric, then ``mean``, ``null``, ``se``, ``n``, ``n_real``, ``against``,
        ``status`` and ``paired``.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {policy: {} for policy in policies}
    for name, facts in metrics.items():
        if facts.get("encoder") is None:  # unavailable, which the summary says
            continue
        encoder = facts["encoder"]
        sets = {p: read_features(policy_folder(run, p), encoder) for p in policies}
        real, keys = read_features(real_folder(run), encoder)
        against = "the real set" if len(real) else f"the clips of {reference}"
        for policy, own in sets.items():
            if len(real):
                base = None if policy == reference else sets[reference]
                found[policy][name] = distance(name, facts, own, real, base, keys)
            elif policy != reference:
                others, keys = sets[reference]
                found[policy][name] = distance(name, facts, own, others, None, keys)
            if name in found[policy]:
                found[policy][name]["against"] = against
    return found


def distance(
    name: str,
    facts: Mapping[str, Any],
    own: Rows,
    real: Tensor,
    base: Rows | None,
    real_keys: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One metric of one policy.

    Args:
        name: Of the metric.
        facts: What is known about it.
        own: Clips of the policy.
        real: What they are compared with.
        base: Clips of the reference, prompt by prompt; None where there is nothing to compare.
        real_keys: Prompt or video of each row of ``real``; by default each has its own.
    """
    features, keys = own
    empty = {"mean": None, "null": None, "se": None, "n": len(features), "n_real": len(real)}
    try:
        metric = set_metric(
            name,
            num_features=features.shape[1],
            features_name=facts["encoder"],
            frames=facts["frames"],
            sync_on_compute=False,  # one process concludes, from the features of all
        )
        others = range(len(real)) if real_keys is None else real_keys
        for side, clips, names in ((False, features, keys), (True, real, others)):
            order = {key: place for place, key in enumerate(dict.fromkeys(names))}
            groups = torch.tensor([order[key] for key in names], dtype=torch.int64)
            metric.update_features(clips, real=side, ids=torch.arange(len(clips)), groups=groups)
        result = asdict(metric.report())
    except ValueError as error:
        return empty | {"status": f"no value: {error}", "paired": None}
    return {
        "mean": result["value"],
        "null": result["null"],
        "se": result["standard_error"],
        "n": result["n"],
        "n_real": result["n_real"],
        "prompts": result["prompts"],
        "status": result["status"],
        "paired": versus(own, base, real) if base and metric.tests_difference else None,
    }


def versus(own: Rows, base: Rows, real: Tensor) -> dict[str, Any] | None:
    """How much further from the real set than the reference, over the prompts that both have.

    The interval is Student's with one degree of freedom less than prompts, from the jackknife; p is
    that of the sign-flip test. These are two approximations and may differ near the threshold, and
    most where prompts are few: below 6 there is no interval.

    Returns:
        As :func:`lightning_kv.runs.analysis.difference`; None for fewer than two prompts that have
        as many windows in both, or where the reference has no distance.
    """
    first, second = Counter(own[1]), Counter(base[1])
    common = sorted(key for key in first if first[key] == second[key])
    if len(common) < 2:
        return None
    order = {key: place for place, key in enumerate(common)}
    mine, theirs = ([key in order for key in keys] for _, keys in (own, base))
    ids = torch.tensor([order[key] for key in own[1] if key in order])
    sides = own[0][mine], base[0][theirs]
    if not all(measurable(side, real.shape[1]) for side in sides):
        return None  # the status of the reference says why
    found = delta_frechet(*sides, real, ids)
    spread = None
    if found.prompts >= 6:
        arm = stdtrit(found.prompts - 1, 0.975).item() * found.standard_error
        spread = [found.value - arm, found.value + arm]
    return {
        "difference": found.value,
        "ci95": spread,
        "se": found.standard_error,
        "p": found.p_value,
        "p_holm": None,
        "d_z": None,
        "n": found.prompts,
    }
