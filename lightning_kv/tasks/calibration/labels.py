"""Labels of heads that a calibration writes, as the settings ``labels`` of presets read them.

Shapes: L layers, H heads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lightning_kv.calibration.clips import profile_of
from lightning_kv.calibration.reduction import Reduced
from lightning_kv.policies.profiles import RULES, Labels, Profile, duo_attention
from lightning_kv.utilities.formatting import several

BY_MASS = ("forcing-kv", "head-forcing")
"""Methods whose rules look at shares of softmax mass."""


def write_labels(
    found: Reduced, chunk: int, horizon: int, model: str, out: Path
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Write labels for forcing-kv, head-forcing, pyramid-forcing and duo-attention.

    Args:
        found: With profiles; without, nothing is written.
        chunk: Frames of a chunk.
        horizon: Frames that the model was trained on.
        model: Name of the model.
        out: Of the curves; ``OUT/METHOD-MODEL.json`` go into the folder of its name without ending.

    Returns:
        The files, and what is to be said of them, and of labels that cannot be told.
    """
    if not found.has("profile/mass"):
        return (), ()
    folder, written, said = out.with_suffix(""), [], []
    source = f"lightning-kv calibrate, {several(len(found.prompts), 'prompt')}"
    for method, (rule, how) in rules_of(found, chunk, horizon).items():
        try:
            labels = rule()
        except ValueError as error:
            said.append(f"No labels of {method}: {error}")
            continue
        counts = Counter(word for row in labels for word in row)
        told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{method}-{model.replace('/', '_')}.json")
        save_labels(written[-1], labels, method, model, f"{told} heads, by {how}", source)
        said.append(f"{written[-1]}: {told}.")
    return tuple(written), tuple(said)


def rules_of(
    found: Reduced, chunk: int, horizon: int
) -> Mapping[str, tuple[Callable[[], Labels], str]]:
    """By method, what gives its labels, and by what rule that is, in words."""
    tables = {name: found.mean(f"profile/{name}") for name in ("mass", "logits")}
    profile = profile_of(tables, chunk)
    seen, lags = profile.starts[-2], profile.logits.shape[-1] - 1
    how = f"the method's rule, with up to {seen} frames of history"
    rules = {name: (partial(by_mass, name, profile, horizon), how) for name in BY_MASS}
    waves = partial(RULES["pyramid-forcing"], profile), f"the method's rule, from {lags} lags"
    rules |= {"pyramid-forcing": waves}
    first = found.settings.sink
    kept = f"the first {first} and the newest frame" if first else "the newest 2 frames"
    ours = (
        f"a rule of ours in place of trained gates: the half that loses most with {kept} alone "
        f"(recency/{found.metric})"
    )
    return rules | {"duo-attention": (partial(streamed, found), ours)}


def by_mass(method: str, profile: Profile, horizon: int) -> Labels:
    """Labels by shares of mass, which fall as history grows: of all that the model was trained on.

    Raises:
        ValueError: The reference held less history than that.
    """
    if (seen := profile.starts[-1]) < horizon:
        raise ValueError(
            f"Its rule looks at clips as long as those that the model was trained on, {horizon} "
            f"frames, and the reference held all history for {seen} frames only. Give a larger "
            "reach, or a reference that holds more, and clips that are as long."
        )
    return RULES[method](profile)


def streamed(found: Reduced) -> Labels:
    """Labels by what heads lose with what a streaming head keeps: first and newest frames.

    Raises:
        ValueError: No curves by recency.
    """
    name = f"recency/{found.metric}"
    if not found.has(name):
        raise ValueError(
            f"{', '.join(found.settings.scorers)} say nothing of heads that keep the newest "
            "frames. Add recency to the scorers."
        )
    budget = max(2, found.settings.sink + 1)
    return duo_attention(found.mean(name)[..., found.settings.budgets.index(budget)])


def save_labels(
    path: Path, labels: Labels, method: str, model: str, about: str, source: str
) -> None:
    """Write a head table that a setting ``labels`` reads."""
    told = {"method": method, "model": [model], "source": source, "about": about}
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in told.items())
    rows = ",\n  ".join(json.dumps(row) for row in labels)
    path.write_text(f'{{\n{head} "labels": [\n  {rows}\n ]\n}}\n')
