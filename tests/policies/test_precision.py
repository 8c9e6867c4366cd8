"""Rows in few bits, also where the model computes in half precision."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import passes, payload, play, policy, session, stores, tape

from lightning_kv.cache.codecs import CODECS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = {"int8": 127, "int4": 7, "int2-centroids": 1}  # on either side of zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", STEPS)
def test_a_round_trip_is_off_by_half_a_step(codec, dtype):
    """Of the row's own scale, and by what numbers of that width cannot hold."""
    rng, dtype = torch.Generator().manual_seed(0), DTYPES[dtype]
    middle = 4 * torch.randn(3, 5, 12, generator=rng)
    x = middle[:, torch.arange(64) % 5] + torch.randn(3, 64, 12, generator=rng)
    x = x.to(dtype)
    rows, shared = CODECS[codec].encode(x)
    back = CODECS[codec].decode(rows, shared)
    assert back.dtype == dtype and back.shape == x.shape
    rounding = 4 * torch.finfo(dtype).eps
    centre = 0.0
    if codec == "int2-centroids":
        near = rows["near"].long().unsqueeze(-1).expand(-1, -1, 12)
        centre = shared["centre"].double().gather(1, near)
    longest = (x.double() - centre).abs().amax(-1, keepdim=True)
    bound = longest / STEPS[codec] / 2 + rounding * (x.double().abs() + longest)
    assert ((back.double() - x.double()).abs() <= bound).all()
    assert rows["codes"].dtype == torch.uint8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 300])
def test_centroids_work_for_any_number_of_rows(count, dtype):
    x = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    codec = CODECS["int2-centroids"]
    back = codec.decode(*codec.encode(x))
    assert back.isfinite().all()
    spread = x.double().abs().amax(-1, keepdim=True)
    assert ((back - x).double().abs() <= 2 * spread.amax()).all()
    blank = torch.zeros_like(x)
    assert not codec.decode(*codec.encode(blank)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", STEPS)
def test_a_drive_stays_near_that_without_a_codec(codec, dtype):
    """Outputs come in the dtype of the queries."""
    outputs = {}
    for precision in ("as-computed", {"part": "aged", "codec": codec, "age": 2}):
        on = session(policy(precision=precision))
        recorded = [
            (step, layer, *(x.to(DTYPES[dtype]) for x in qkv))
            for step, layer, *qkv in tape(passes(5, noisy=1))
        ]
        outputs[str(precision)] = play(on, recorded)
        assert payload(stores(on)[0], "k", 0).dtype == DTYPES[dtype]
    plain, coded = outputs.values()
    far = max(float((a - b).abs().max()) for a, b in zip(plain, coded, strict=True))
    assert 0 < far < {"int8": 0.06, "int4": 0.3, "int2-centroids": 1.5}[codec]
