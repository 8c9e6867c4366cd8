"""DuoAttention against plain Python: full heads, and heads of sink and last frames."""

import pytest
import torch

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
)

R, S = "retrieval", "streaming"
LABELS = ((R, S, R, S), (S, S, R, S), (S, S, S, S))


class DuoScript(Script):
    """The method once more: one head at a time."""

    def __init__(self, frames=None, sink=1, recent=1):
        self.frames, self.sink, self.last, self.dropped = frames, sink, recent, 0

    def commit(self, stream, step):
        made = step.final[-1] + 1
        if self.frames is not None and made <= self.frames:
            return
        held = sorted({row.frame for row in stream.rows})
        sink = [f for f in held if f < self.sink]
        if LABELS[stream.layer][stream.head] == S:
            kept = sink + held[len(sink) :][-self.last :]
        else:
            room = len(held) if self.frames is None else self.frames - len(sink)
            kept = sink + held[len(sink) :][-room:]
        self.dropped += len(kept) < len(held)
        stream.rows = [row for row in stream.rows if row.frame in kept]


def policy(budget=None, labels=LABELS, **settings):
    part = {"part": "duo-attention", "budget": budget, "labels": labels, **settings}
    return policy_from_dict({"name": "x", "retain": part})


CASES = {
    "threes, no budget": (None, {}, chunked([3] * 14, noisy=1)),
    "threes": (9, {}, chunked([3] * 13 + [1], noisy=1)),
    "singles": (5, {"sink": 0, "recent": 2}, chunked([1] * 14, noisy=1)),
    "pairs, a given chunk": (7, {"sink": 3, "recent": 3}, chunked([2] * 14, noisy=1, context=1)),
    "fours": (4, {"sink": 2}, chunked([4] * 14, noisy=1)),
    "guided": (6, {}, guided(chunked([2] * 14, noisy=1))),
    "several chunks in flight": (6, {}, rolling(2, 28, 3)),
}


@pytest.mark.parametrize("name", sorted(CASES, key=lambda name: name != "singles"))
@pytest.mark.thinned(20)
def test_every_decision_is_the_twins(name):
    frames, settings, steps = CASES[name]
    events = (Event("prompt_switch", 12, "a"),) if "flight" not in name else ()
    tape = random_tape(
        steps, heads=4, layers=3, batch=2, grid=(1, 2), dtype=torch.float64, events=events
    )
    script = DuoScript(frames, **settings)
    made = policy(None if frames is None else f"{frames}f", **settings)
    found = compare_decisions(made, script, tape)
    assert found.total >= 200 and found.equal == found.total
    assert script.dropped > 100
    if name == "threes":
        assert_same_as_twin(made, DuoScript(frames, **settings), tape)


def test_gates_of_a_file_of_the_authors_are_labels(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("9.53e-01\t-1.5e-04\n4.9e-01\t5.0e-01\n")
    made = policy(labels=str(path))
    assert made.retain.labels.rows == ((R, S), (S, R))
    assert policy(labels=str(path), threshold=0.4).retain.labels.rows == ((R, S), (R, R))
    assert policy(labels=[[1, 0], [R, S]]).retain.labels.rows == ((R, S), (R, S))


def test_labels_of_forcing_kv_serve_too():
    """Static heads stream, dynamic ones retrieve, whichever way the table is named."""
    assert preset("duo-attention").retain.labels.auto == "duo-attention forcing-kv"
    other, names = {R: "dynamic", S: "static"}, ("panorama", "self-forcing", "longlive")
    theirs = tuple(tuple(other[word] for word in row) for row in LABELS)
    tape = random_tape(chunked([3] * 6, noisy=1), heads=4, layers=3, grid=(1, 2))
    assert compare_decisions(policy(labels=theirs), DuoScript(), tape).equal > 50
    for name in names:
        assert policy(labels=f"forcing-kv-{name}").retain.labels.rows


def test_the_preset_takes_a_budget():
    assert preset("duo-attention").retain.budget is None
    assert preset("duo-attention@9f").retain.budget.amount == "9f"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"recent": 0}, "recent"),
        ({"threshold": 2}, "threshold"),
        ({"labels": [["both"]]}, r"streaming \(0\), retrieval \(1\)"),
        ({"budget": "1f"}, "must lie between 2f"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(**settings).check(random_tape(layers=3, heads=4).geometry, 3, 24)
