"""What a scorer sees: against plain loops, whatever the sampler, and with nothing of the future."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow_features import every_list

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.base import PositionsPart
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.policies.scorer import running
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES
from lightning_kv.testing.candidate import play
from lightning_kv.testing.schedules import chunked, rolling
from lightning_kv.testing.tapes import random_tape

NAMES = tuple(FEATURES)
QUERIES = 5  # of the 18 that a chunk of three frames has


@dataclass(frozen=True)
class Clipped(PositionsPart):
    """No query frame meets a row at more than 4 frames."""

    name: ClassVar[str] = "clipped-at-4"

    def lags(self, view, state, selection=None):
        times = torch.tensor(view.step.query_times, dtype=view.time.dtype).view(1, -1, 1)
        return (times - view.time.unsqueeze(1)).clamp_max(4.0)


@pytest.fixture
def watched(monkeypatch):
    """What parts see at each question: step, frames by layer, features."""
    found, own = [], running.lists_of

    def spy(part, views, state, names):
        made = own(part, views, state, names)
        frames = [(view.layer, view.frames) for view in views]
        found.append((views[0].step, dict(zip(dict(frames), made, strict=True)), dict(frames)))
        return made

    monkeypatch.setattr(running, "lists_of", spy)
    return found


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """Path of an untrained scorer for a tape."""

    def made(tape, **settings):
        settings = {"queries": QUERIES, **settings}
        path = tmp_path_factory.mktemp("scorers") / "scorer.safetensors"
        Scorer.fresh("mlp", tape.geometry, **settings).save(path)
        return str(path)

    return made


def policy_of(path, budget="5f", **others):
    retain = {"part": "distilled", "scorer": path, "budget": budget}
    return policy_from_dict({"name": "mine", "retain": retain, **others})


def numbers(watched, namespace="cond"):
    """Features and context by chunk, layer, head and frame, of candidates alone."""
    found = {}
    for step, listed, frames in watched:
        if step.namespace != namespace:
            continue
        for layer, own in listed.items():
            for head, line in enumerate(own.candidate.tolist()):
                rows = {
                    frame: own.features[head, place]
                    for place, frame in enumerate(frames[layer])
                    if line[place]
                }
                found[step.chunk, layer, head] = rows, own.context[head]
    return found


SHARES = [[0.6, 1.0, 1.4], [1.4, 0.6, 1.0]]
UNEVEN = {"part": "table", "amount": "5f", "shares": SHARES}
SIZES = {"dtype": torch.float64, "gain": 3.0}
TAPES = {
    "chunks": lambda: random_tape(chunked((3,) * 6, 1), **SIZES),
    "a short last chunk": lambda: random_tape(chunked((3, 3, 3, 3, 2), 1), **SIZES),
    "given frames": lambda: random_tape(chunked((2,) * 6, 1, context=3), grid=(1, 4), **SIZES),
    "rolling": lambda: random_tape(rolling(2, 12, 3), grid=(1, 4), **SIZES),
    "a switch": lambda: random_tape(
        chunked((3,) * 6, 1), events=(Event("prompt_switch", 9, "x"),), **SIZES
    ),
}
CASES = [
    *((name, "5f", "absolute") for name in TAPES),
    ("chunks", UNEVEN, "absolute"),
    ("rolling", UNEVEN, "absolute"),
    ("chunks", "5f", "clipped-at-4"),
    ("rolling", "5f", "clipped-at-4"),
]


def clipped(frame, query, start):
    return query - min(query - frame, 4)


@pytest.mark.parametrize(("name", "budget", "positions"), CASES)
def test_features_are_those_of_plain_loops(watched, scorer, name, budget, positions):
    tape = TAPES[name]()
    policy = policy_of(scorer(tape), budget, positions=positions)
    decisions = play(policy, tape).decisions
    kept = {key[2:4]: None for key in decisions.kept} and {
        (key[4], *key[2:4]): {row[0] for row in rows} for key, rows in decisions.kept.items()
    }
    each = [[5 * x for x in row] for row in SHARES] if budget is UNEVEN else [[5] * 3] * 2
    read = {} if positions == "absolute" else {"read": clipped}
    slow = every_list(tape, kept, each, QUERIES, **read)
    found = numbers(watched)
    assert len(found) >= 12
    for place, (rows, context) in found.items():
        theirs, around = slow[place]
        assert rows.keys() == theirs.keys()
        for frame, own in rows.items():
            wanted = torch.tensor([theirs[frame][feature] for feature in NAMES])
            torch.testing.assert_close(own, wanted, atol=2e-5, rtol=1e-4, msg=lambda t: f"{t}")
        wanted = torch.tensor([around[feature] for feature in CONTEXT])
        torch.testing.assert_close(context, wanted, atol=2e-5, rtol=1e-4)
