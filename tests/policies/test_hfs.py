"""HFS as a selection: greedy choices against brute loops."""

import statistics
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import pooled_logit, pools, zscores

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import load_policy
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
    without_commits,
)


@dataclass
class Rule:
    """The settings, in frames."""

    budget: int = 4
    coverage: float = 0.5
    redundancy: float = 0.5
    groups: int | None = None
    mean_share: float = 0.5
    per_query_frame: bool = True
    anchors: int = 3

    def settings(self):
        """The same for the part."""
        return {"part": "hfs", **self.__dict__, "budget": f"{self.budget}f"}


def value(chosen, relevance, alike, rule):
    """What a set is worth: computed anew from the definition."""
    total = sum(relevance[f] for f in chosen)
    total += rule.coverage * sum(max(alike[f, g] for f in chosen) for g in relevance)
    pairs = combinations(sorted(chosen), 2)
    return total - rule.redundancy * sum(max(0.0, alike[pair]) for pair in pairs)


class HfsScript(Script):
    """Tries every frame, and takes the one that makes the set worth most."""

    def __init__(self, rule, window=None):
        self.rule, self.window, self.kept, self.left_out = rule, window, {}, 0

    def commit(self, stream, step):
        """All, or the newest frames."""
        held = sorted({row.frame for row in stream.rows})
        if self.window:
            kept = held[-self.window[stream.layer][stream.head] :]
            stream.rows = [row for row in stream.rows if row.frame in kept]

    def look(self, stream, step, q, k):
        """Choose for each query frame."""
        past = {}
        for row in sorted(stream.rows, key=lambda row: row.frame):
            past.setdefault(row.frame, []).append((row.place, stream.key(row)))
        if len(past) <= self.rule.budget:
            self.kept[id(stream)] = {f: set(past) for f in step.frames}
            return
        mean = {f: sum(k for _, k in rows) / len(rows) for f, rows in past.items()}
        size = {f: float(x @ x) ** 0.5 for f, x in mean.items()}
        alike = {(f, g): float(mean[f] @ mean[g]) / size[f] / size[g] for f in past for g in past}
        asked = {}
        for query in stream.queries:
            asked.setdefault(query.frame, []).append((query.place, query.turned))
        self.kept[id(stream)] = {}
        for frame in step.frames:
            own = [asked[frame]] if self.rule.per_query_frame else list(asked.values())
            found = self.greedy(self.relevance(stream, past, own), alike)
            self.kept[id(stream)][frame] = found
            self.left_out += len(past) > len(found)

    def relevance(self, stream, past, asked):
        """Standardised mean logits between pooled tokens."""
        tokens, groups = stream.geometry.tokens, self.rule.groups or stream.geometry.grid[0]
        share, scores = self.rule.mean_share, []
        for rows in past.values():
            keys = pools(rows, tokens, groups, share)
            each = [pooled_logit(pools(own, tokens, groups, share), keys) for own in asked]
            scores.append(statistics.fmean(each))
        return dict(zip(past, zscores(scores), strict=True))

    def greedy(self, relevance, alike):
        """One frame after the other."""
        chosen, every = set(), list(relevance)
        while len(chosen) < self.rule.budget:
            offered = [f for f in every if f not in chosen]
            if not chosen and self.rule.anchors:
                offered = every[: self.rule.anchors]
            worth = {f: value({*chosen, f}, relevance, alike, self.rule) for f in offered}
            chosen.add(max(offered, key=lambda f: (worth[f], -f)))
        return chosen

    def reads(self, stream, step, frame, index, row, current):
        """Chosen frames and the chunk itself."""
        return current or row.frame in self.kept[id(stream)][frame]


def hfs(rule, **parts):
    """A policy with the part."""
    return load_policy({"name": "x", "select": rule.settings(), **parts})


SPANS = [[3, 7, 9], [8, 5, 4]]
RAGGED = {"part": "table", "amount": "9f", "shares": [[x / 9 for x in own] for own in SPANS]}
WINDOW = {"retain": {"part": "window", "budget": RAGGED}}
ONES, TWOS = chunked([1] * 18, 1), chunked([2] * 14, 1)
TOGETHER = Rule(6, per_query_frame=False)
CASES = {
    "chunks of 1, a switch": (ONES, (1, 3), 1, Rule(), None),
    "the default": (TWOS, (2, 2), 1, Rule(), None),
    "a short last, two samples": (chunked([3] * 6 + [1], 1), (2, 3), 2, Rule(5), None),
    "chunks of 4, all together": (chunked([4] * 14, 0), (1, 2), 1, TOGETHER, None),
    "coverage alone": (TWOS, (3, 1), 1, Rule(3, coverage=4.0, redundancy=0.0), None),
    "redundancy, no anchors": (TWOS, (3, 2), 1, Rule(5, redundancy=3.0, anchors=0), None),
    "neither": (TWOS, (1, 4), 1, Rule(4, coverage=0.0, redundancy=0.0, groups=3), None),
    "heads of other lengths": (TWOS, (1, 3), 1, Rule(4, mean_share=0.2), SPANS),
    "rolling": (rolling(2, 20, 3), (1, 3), 1, Rule(), None),
    "no commit pass": (without_commits(chunked([2] * 18, 1)), (1, 3), 1, Rule(), None),
    "guided": (guided(ONES), (1, 3), 1, Rule(), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(11)
def test_every_choice_is_that_of_brute_loops(case):
    steps, grid, batch, rule, window = CASES[case]
    event = [Event("prompt_switch", 10, "another prompt")]
    sizes = {"grid": grid, "batch": batch, "heads": 3, "events": event, "seed": len(case)}
    tape = random_tape(steps, **sizes, gain=1.0, dtype=torch.float64)
    script = HfsScript(rule, window)
    policy = hfs(rule, **(WINDOW if window else {}))
    found = compare_decisions(policy, script, tape, kinds=["read"])
    assert found.equal == found.total >= 200 and script.left_out > 50


@pytest.mark.slow
def test_outputs_are_those_of_the_twin():
    rule = Rule()
    tape = random_tape(chunked([2] * 6, 1), heads=2, grid=(1, 3))
    assert_same_as_twin(hfs(rule), HfsScript(rule), tape)


def test_frames_that_repeat_each_other_are_read_once():
    """Of frames that are equal, and met at one time, a second adds nothing: others are read."""
    tape = random_tape(chunked([1] * 8, 0), layers=1, heads=1, grid=(1, 2), gain=0.0)
    for entry in tape.entries[1:7]:
        if entry.step.start not in (3, 5):
            entry.layers[0][1].copy_(tape.entries[0].layers[0][1])
    seen = {}

    def watch(view):
        seen[view.step.start] = set(view.frame_ids[view.selection.frames[0, 0]].tolist())

    quiet = {"positions": {"part": "clamp", "lag": 0}}  # all at the same time
    tape.play(tape.session(hfs(Rule(3), **quiet), watch=lambda v: v.selection and watch(v)))
    assert seen[7] == {0, 3, 5}


def test_settings_that_cannot_work():
    for wrong in ({"coverage": -1.0}, {"redundancy": -0.5}, {"anchors": -1}, {"mean_share": 2.0}):
        with pytest.raises(ValueError, match="must be"):
            hfs(Rule(**wrong))
    with pytest.raises(ValueError, match=r"groups=7 .* from 1 to 6"):
        hfs(Rule(groups=7)).check(random_tape().geometry, 3, 24)
    both = Rule().settings() | {"budget": {"part": "adaptive", "amount": "4f"}}
    with pytest.raises(ValueError, match="only rank within one"):
        load_policy({"name": "x", "select": both}).check(random_tape().geometry, 3, 24)
