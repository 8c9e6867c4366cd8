"""Mean logits by lag, against loops over single queries and keys."""

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.lags import LagRecorder
from lightning_kv.cache.record import recorders
from lightning_kv.cache.recorder import Clip
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.testing import chunked, random_tape
from lightning_kv.testing.twin import turn


@pytest.mark.parametrize("policy", ["full", "sliding-window@2f", "ada-kv@3f"])
def test_every_lag_is_the_mean_over_queries_keys_and_passes(policy):
    """Over all frames that were ever held: what memory has dropped since is not forgotten."""
    tape = random_tape(chunked([2, 2, 1, 2], noisy=2), heads=2, grid=(1, 3), batch=2)
    geometry, tokens, frames = tape.geometry, 3, 7
    (recorder,) = recorders("lags")
    about = (frames, 4, geometry)
    recorder.begin([Clip(key, i, *about) for i, key in enumerate(tape.keys)])
    tape.play(preset(policy), watch=recorder)
    sums, weights, held = {}, {}, {}
    for entry in tape.entries:
        step = entry.step
        weight = 0.5 if step.phase == "commit" else 1.0
        for layer, (q, k, _) in enumerate(entry.layers):
            for frame in range(step.start):
                for i, now in enumerate(step.frames):
                    for sample in range(2):
                        for head in range(2):
                            key = held[layer, frame][sample, :, head]
                            query = q[sample, i * tokens : (i + 1) * tokens, head]
                            total = sum(
                                float(asked @ turn(geometry, key[b], frame, b))
                                for asked in (
                                    turn(geometry, x, now, a) for a, x in enumerate(query)
                                )
                                for b in range(tokens)
                            )
                            at = sample, layer, head, now - frame
                            mean = total / tokens**2 / geometry.head_dim**0.5
                            sums[at] = sums.get(at, 0.0) + weight * mean
                            weights[at] = weights.get(at, 0.0) + weight
            for i, frame in enumerate(step.frames if step.final else ()):
                held[layer, frame] = k[:, i * tokens : (i + 1) * tokens]
    for sample in range(2):
        logits = recorder.table(sample).logits["cond"]
        expected = torch.zeros(geometry.layers, 2, frames)
        for (owner, layer, head, lag), total in sums.items():
            if owner == sample:
                expected[layer, head, lag] = total / weights[owner, layer, head, lag]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert recorder.size(recorder.clips[0]) == logits.numel() * 4


def test_frames_that_are_dropped_do_not_count_where_positions_move():
    """Their keys would have to be turned on with every chunk."""
    tape = random_tape(chunked([2] * 4, noisy=1), heads=2, grid=(1, 3))
    found = {}
    for positions in ("absolute", "contiguous"):
        (recorder,) = recorders("lags")
        recorder.begin([Clip(tape.keys[0], 0, 8, 4, tape.geometry)])
        window = {"part": "window", "budget": "2f"}
        told = {"name": "x", "retain": window, "positions": positions}
        tape.play(policy_from_dict(told), watch=recorder)
        logits = recorder.table(0).logits["cond"]
        found[positions] = logits.abs().amax((0, 1)).gt(0).tolist()
    assert found["absolute"] == [False] + [True] * 7
    assert found["contiguous"] == [False] + [True] * 3 + [False] * 4


def test_it_is_one_of_the_tables_that_can_be_asked_for():
    assert isinstance(recorders({"lags": {}})[0], LagRecorder)
    with pytest.raises(ValueError, match="lags"):
        recorders("lag")
    with pytest.raises(ValueError, match="queries"):
        recorders({"lags": {"queries": 4}})
