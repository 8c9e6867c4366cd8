"""Rows in few bits, also where the model computes in half precision, on the way through a cache."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import passes, payload, play, policy, session, stores, tape

from lightning_kv.cache.codecs import CODECS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = {"int8": 127, "int4": 7}  # on either side of zero
FAR = {"int8": 0.06, "int4": 0.3, "kivi": 1.5, "quant-video-gen": 1.5, "budget-pca": 1.5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", STEPS)
def test_a_round_trip_is_off_by_half_a_step(codec, dtype):
    """Of the row's own scale, and by what numbers of that width cannot hold."""
    dtype, own = DTYPES[dtype], CODECS[codec].keys
    x = torch.randn(3, 64, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, shared = own.encode(x)
    back = own.decode(rows, shared)
    assert back.dtype == dtype and back.shape == x.shape
    rounding = 4 * torch.finfo(dtype).eps
    longest = x.double().abs().amax(-1, keepdim=True)
    bound = longest / STEPS[codec] / 2 + rounding * (x.double().abs() + longest)
    assert ((back.double() - x.double()).abs() <= bound).all()
    assert rows["codes"].dtype == torch.uint8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 16, 300])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_work_for_any_number_of_rows(codec, count, dtype):
    """Nothing is off by more than what the numbers span; zeros stay zeros."""
    x = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    for name in "kv":
        own = CODECS[codec].of(name)
        back = own.decode(*own.encode(x))
        assert back.shape == x.shape and back.isfinite().all()
        assert ((back - x).double().abs() <= 2 * x.double().abs().amax()).all()
        assert not own.decode(*own.encode(torch.zeros_like(x))).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_drive_stays_near_that_without_a_codec(codec, dtype):
    """Outputs and what is shown come in the dtype of the queries."""
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
    assert 0 < far < FAR[codec]
