"""TriAttention against its slow twin, its statistics made beforehand, and what it refuses."""

import cmath
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow_units import RAGGED, UnitScript, by_frame

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.policies.registry import load_policy, policy_from_dict, policy_to_dict, preset
from lightning_kv.testing import (
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
    without_commits,
)


def pairs(vector):
    """Complex numbers of a real vector."""
    numbers = vector.tolist()
    return [complex(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]


def frequencies(geometry):
    """Those of time; the pairs of both axes of place stand still."""
    side = 2 * (geometry.head_dim // 6)
    time = geometry.head_dim - 2 * side
    moving = [geometry.rotary.theta[0] ** (-2 * f / time) for f in range(time // 2)]
    return moving + [0.0] * side


class TriScript(UnitScript):
    """The score of a row is a sum of cosines, averaged over offsets, standardised, ranked."""

    def __init__(self, frames, *settings, mode="perhead", furthest=128, horizon=12, **more):
        super().__init__(frames, *settings, **more)
        self.mode, self.furthest, self.horizon = mode, furthest, horizon
        self.asked, self.scores = {}, {}

    def look(self, stream, step, q, k):
        key = (stream.namespace, stream.sample, stream.layer, stream.head)
        late = step.final and step.final[-1] >= self.horizon
        if step.phase == "denoise" or step.rebuild or (late and key in self.asked):
            return
        own = [pairs(query.raw.double()) for query in stream.queries if query.frame in step.final]
        self.asked.setdefault(key, []).extend(own)

    def one(self, stream, start):
        """Standardised score of every row of a head."""
        asked = self.asked[stream.namespace, stream.sample, stream.layer, stream.head]
        speed, furthest = frequencies(stream.geometry), min(self.furthest, 12)
        means, lengths = [], []
        for f in range(len(speed)):
            means.append(sum(q[f] for q in asked) / len(asked))
            lengths.append(sum(abs(q[f]) for q in asked) / len(asked))
        offsets = [2**i for i in range(10) if 2**i <= furthest]
        found = {}
        for row in stream.rows:
            total = 0.0
            for f, k in enumerate(pairs(row.k.double())):
                phase = cmath.phase(means[f] * k.conjugate())
                turns = [math.cos(speed[f] * (start - row.time + o) + phase) for o in offsets]
                total += abs(means[f]) * abs(k) * sum(turns) / len(turns)
                total += (lengths[f] - abs(means[f])) * abs(k)
            found[row.frame, row.place] = total
        middle = sum(found.values()) / len(found)
        spread = math.sqrt(sum((x - middle) ** 2 for x in found.values()) / len(found))
        return {name: (x - middle) / (spread or 1.0) for name, x in found.items()}

    def gathered(self, streams, step):
        start = step.final[-1] + 1
        each = {(s.layer, s.head): self.one(s, start) for s in streams}
        if self.mode == "perhead":
            layers = sorted({layer for layer, _ in each})
            for _, head in list(each):
                first = each[0, head]
                mean = {
                    name: sum(each[layer, head][name] for layer in layers) / len(layers)
                    for name in first
                }
                self.scores |= {(layer, head): mean for layer in layers}
        else:
            self.scores = each

    def mass(self, stream, step):
        return self.scores[stream.layer, stream.head]

    def values(self, stream, names, mass):
        rows = {name: mass[name] for name in names}
        return by_frame(rows) if self.granularity == "frame" else rows


def policy(budget, **settings):
    retain = {"part": "tri-attention", "budget": budget, **settings}
    return policy_from_dict({"name": "x", "retain": retain})


SWITCH = (Event("prompt_switch", 12, "another"),)
ONES, TWOS = chunked([1] * 14, noisy=0), chunked([2] * 14, noisy=0)
SHORT, FOURS = chunked([3] * 13 + [1], noisy=0), chunked([4] * 14, noisy=0)
LAYER, TOKEN = {"mode": "layer_perhead"}, {"granularity": "token"}
CASES = {
    "rows": (ONES, "15t", 2.5, TOKEN, {"batch": 2, "grid": (2, 3)}),
    "rows of each layer, a sink": (
        TWOS, "13t", 13 / 3, TOKEN | LAYER | {"sink": 1}, {"batch": 2, "grid": (1, 3)},
    ),
    "frames, short last, a switch": (
        SHORT, "5f", 5, {"horizon": 7}, {"batch": 2, "grid": (1, 2), "events": SWITCH},
    ),
    "heads hold others": (
        ONES, *RAGGED, LAYER, {"batch": 2, "grid": (1, 5)},
    ),
    "fours, near": (FOURS, "6f", 6, {"furthest": 3}, {"batch": 2, "grid": (2, 1)}),
    "guided": (guided(ONES), "7t", 7 / 3, TOKEN, {"grid": (1, 3)}),
    "several in flight": (rolling(2, 28, 2), "4f", 4, {}, {"batch": 2, "grid": (1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(4)
def test_every_decision_is_that_of_the_slow_twin(case):
    steps, budget, frames, settings, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, seed=len(case), heads=4, **world)
    script = TriScript(frames, **settings)
    found = compare_decisions(policy(budget, **settings), script, tape)
    assert found.equal == found.total >= 200 or (case == "guided" and found.total == 224)
    assert min(script.evictions.values()) > 2


def test_outputs_and_rows_are_those_of_the_twin():
    tape = random_tape(chunked([2] * 6, noisy=1), heads=2, grid=(2, 2))
    made = policy("13t", granularity="token", sink=1)
    assert_same_as_twin(made, TriScript(13 / 4, "token", 1), tape)


def beforehand(tmp_path, ending=".json"):
    """A file with means of the clean queries of a tape, by layer and head, and the tape."""
    tape, found = random_tape(chunked([2] * 8, noisy=1), heads=2, batch=2), {}
    clean = [[e.layers[n][0].double() for e in tape.entries if e.step.final] for n in range(2)]
    queries = [torch.cat([x.flatten(0, 1) for x in own]) for own in clean]  # [rows, H, D]
    found["mean"] = torch.stack([own.mean(0) for own in queries])
    pairs = [own.unflatten(-1, (-1, 2)).norm(dim=-1) for own in queries]
    found["length"] = torch.stack([own.mean(0) for own in pairs])
    path = tmp_path / f"queries{ending}"
    if ending == ".json":
        path.write_text(json.dumps({name: own.tolist() for name, own in found.items()}))
    else:
        curves = {"mass/gn": torch.zeros(2, 2, 2, 2)}
        HeadCurves((1, 2), curves, {}, {f"query/{k}": own for k, own in found.items()}).save(path)
    return path, tape


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_statistics_made_beforehand(tmp_path, ending):
    """They are those of the file, and nothing is measured in the rollout itself."""
    path, tape = beforehand(tmp_path, ending)
    made = policy("4f", statistics=str(path))
    table = made.retain.statistics
    clean = [e.layers[1][0] for e in tape.entries if e.step.final]
    queries = torch.cat([x.flatten(0, 1) for x in clean])[:, 0].double()  # of layer 1, head 0
    assert table.mean[1][0] == pytest.approx(queries.mean(0).tolist(), abs=1e-12)
    lengths = queries.unflatten(-1, (-1, 2)).norm(dim=-1).mean(0)
    assert table.length[1][0] == pytest.approx(lengths.tolist(), abs=1e-12)
    assert (table.file, len(table.sha256)) == (f"queries{ending}", 64)
    assert policy_from_dict(policy_to_dict(made)) == made
    session = tape.session(made)
    tape.play(session)
    state = session.samples[0].states["cond"]["retain"]
    assert "query_means" not in state and set(state["given"]) == {0, 1}
    assert len(session.samples[0].stores["cond"][0].frames) >= 4


def test_head_curves_without_queries(tmp_path):
    path = tmp_path / "heads.safetensors"
    HeadCurves((1, 2), {"mass/gn": torch.zeros(2, 2, 2, 2)}).save(path)
    with pytest.raises(ValueError, match=r"heads.safetensors' holds no means of queries: KeyErr"):
        policy("6f", statistics=str(path))


def test_without_commit_passes_statistics_must_be_given(tmp_path):
    path, _ = beforehand(tmp_path)
    tape = random_tape(without_commits(chunked([2] * 6)), heads=2)
    with pytest.raises(ValueError, match=r"knows no query of a clean pass.*or give statistics"):
        tape.play(policy("4f"))
    tape.play(policy("4f", statistics=str(path)))


def test_the_first_pass_counts_even_beyond_the_horizon():
    """Given frames may come in one pass; nothing else would be known."""
    tape = random_tape(chunked([4] * 4, noisy=0))
    session = tape.session(policy("4f", horizon=2))
    tape.play(session)
    assert session.samples[0].states["cond"]["retain"]["query_means"][0].rows == 24


def test_the_preset_keeps_single_rows_and_the_same_in_all_layers():
    tape = random_tape(chunked([3] * 6, noisy=1), layers=3)
    session = tape.session(preset("tri-attention@5f"))
    tape.play(session)
    held = []
    for store in session.samples[0].stores["cond"]:
        table = store.table
        own = torch.stack([table.frame_id, table.raster.to(table.frame_id)], -1)
        held.append(own.expand(3, -1, -1))
    assert all(own.shape[1] == 30 for own in held)
    assert torch.equal(held[0], held[1]) and torch.equal(held[0], held[2])
    assert len(set(held[0][..., 0].flatten().tolist())) > 5, "rows of many frames"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "head"}, "mode='head' .* perhead, layer_perhead"),
        ({"furthest": 0}, "furthest=0 .* 1 or more"),
        ({"horizon": 0}, "horizon=0 .* 1 or more"),
        ({"statistics": "nowhere.json"}, "No means of queries at 'nowhere.json'. Give a JSON"),
        ({"statistics": [1.0]}, "are no means of queries. Give a JSON"),
    ],
)
def test_settings_that_cannot_work(settings, said):
    with pytest.raises(ValueError, match=said):
        policy("6f", **settings)


def test_a_file_that_is_no_table(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"mean": [[0.1]]}')
    with pytest.raises(ValueError, match=r"x\.json' holds no means of queries: TypeError"):
        policy("6f", statistics=str(path))


def test_statistics_of_another_model(tmp_path):
    path, _ = beforehand(tmp_path)
    geometry = random_tape(heads=3).geometry
    with pytest.raises(ValueError, match=r"\(queries.json\) were made for another model. This one"):
        policy("6f", statistics=str(path)).check(geometry, 3, 24)


def test_layers_that_rank_together_keep_equally_much():
    budget = {"part": "pyramid", "amount": "6f"}
    geometry = random_tape().geometry
    with pytest.raises(
        ValueError, match=r"budget part 'pyramid' gives heads .* 9f, or mode: layer_perhead\."
    ):
        policy(budget).check(geometry, 3, 24)
    policy(budget, mode="layer_perhead").check(geometry, 3, 24)
    load_policy({"name": "x", "retain": "tri-attention"}).check(geometry, 3, 24)
