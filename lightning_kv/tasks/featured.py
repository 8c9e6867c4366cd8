"""Distances between sets of clips: features on disk, and what they come to.

``features/policies/POLICY/KEY.npz`` and ``features/real/KEY.npz`` hold, by the name of an encoder,
float32 ``[windows, d]``: what it makes of the consecutive windows of a clip.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kv.data.videos import SUFFIXES, read
from lightning_kv.metrics.backbones import Backbone
from lightning_kv.metrics.frechet_difference import delta_frechet
from lightning_kv.metrics.suite import set_metric
from lightning_kv.metrics.windows import Windows
from lightning_kv.report.records import RunDirectory, write_atomic

Rows = tuple[Tensor, list[str]]
"""Features ``[n, d]``, and the prompt key of each."""


def policy_folder(run: RunDirectory, policy: str) -> Path:
    """Where the features of a policy are."""
    return run.features / "policies" / re.sub(r"[^\w@.+-]+", "_", policy)


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
    write_atomic(folder / f"{key.replace('/', '__')}.npz", file.getvalue())


def featured(folder: Path, key: str) -> bool:
    """Whether the features of a clip are there."""
    return (folder / f"{key.replace('/', '__')}.npz").is_file()


def read_features(folder: Path, encoder: str) -> Rows:
    """Features of all clips of a folder, in the order of their keys.

    Raises:
        ValueError: A file is damaged.
    """
    found, keys = [], []
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = torch.from_numpy(file[encoder])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read as features of {encoder} ({type(error).__name__}: {error})."
                " Remove it, and take the run up again."
            ) from error
        found.append(rows)
        keys += [path.stem] * len(rows)
    return (torch.cat(found) if found else torch.empty(0, 0)), keys


def read_real(run: RunDirectory, folder: Path, encoders: Mapping[str, Backbone]) -> None:
    """Show real videos to the encoders and keep what they say.

    Raises:
        ValueError: There are no videos, or one cannot be read.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"There are no videos in --real {folder}. Give a folder of {', '.join(SUFFIXES)} files."
        )
    for path in paths:
        key = path.relative_to(folder).with_suffix("").as_posix()
        if featured(real_folder(run), key):
            continue
        windows = {name: Windows(encoder) for name, encoder in encoders.items()}
        for block in read(path):
            for each in windows.values():
                each.add(block.float() / 255)
        write_features(
            real_folder(run), key, {name: each.features() for name, each in windows.items()}
        )


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
        real, _ = read_features(real_folder(run), encoder)
        against = "the real set" if len(real) else f"the clips of {reference}"
        for policy, own in sets.items():
            if len(real):
                base = None if policy == reference else sets[reference]
                found[policy][name] = distance(name, facts, own, real, base)
            elif policy != reference:
                found[policy][name] = distance(name, facts, own, sets[reference][0], None)
            if name in found[policy]:
                found[policy][name]["against"] = against
    return found


def distance(
    name: str, facts: Mapping[str, Any], own: Rows, real: Tensor, base: Rows | None
) -> dict[str, Any]:
    """One metric of one policy; ``base`` holds the clips of the reference, prompt by prompt."""
    features, keys = own
    prompts = len(set(keys))
    empty = {"mean": None, "null": None, "se": None, "n": len(features), "n_real": len(real)}
    try:
        metric = set_metric(
            name,
            num_features=features.shape[1],
            features_name=facts["encoder"],
            frames=facts["frames"],
        )
        for side, clips in ((False, features), (True, real)):
            metric.update_features(clips, real=side, ids=torch.arange(len(clips)))
        result = asdict(metric.report())
    except ValueError as error:
        return empty | {"status": f"no value: {error}", "paired": None}
    return {
        "mean": result["value"],
        "null": result["null"],
        "se": result["standard_error"],
        "n": result["n"],
        "n_real": result["n_real"],
        "prompts": prompts,
        "status": result["status"],
        "paired": None if base is None or "fvd" not in name else versus(own, base, real),
    }


def versus(own: Rows, base: Rows, real: Tensor) -> dict[str, Any] | None:
    """How much further from the real set than the reference, over the prompts that both have."""
    common = sorted(set(own[1]) & set(base[1]))
    order = {key: place for place, key in enumerate(common)}
    first, second = (
        torch.stack([row for row, key in zip(*rows, strict=True) if key in order])
        for rows in (own, base)
    )
    ids = torch.tensor([order[key] for key in own[1] if key in order])
    if first.shape != second.shape or len(common) < 2:
        return None
    found = delta_frechet(first, second, real, ids)
    spread = None
    if found.standard_error is not None:
        arm = 1.96 * found.standard_error
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
