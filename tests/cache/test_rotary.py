"""Rotary identities, and the embedding against complex multiplication."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.grids import pack, unpack
from lightning_kv.cache.rotary import Rotary, rotate

numbers = st.integers(-6000, 6000)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([12, 24, 64, 128]), numbers, numbers, st.integers(0, 60), st.integers(0, 104)
)
def test_shift_inverse_and_relative_property(width, time, delta, row, column):
    rotary = Rotary(width)
    x, y = torch.randn(
        2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width)
    )
    spot = [torch.tensor(float(p)) for p in (time, row, column)]
    angles = rotary.angles(*spot)
    moved = rotary.angles(spot[0] + delta, *spot[1:])
    turned = rotate(x, angles)
    torch.testing.assert_close(rotate(turned, -angles), x)
    shift = rotary.angles(spot[0] * 0 + delta, spot[1] * 0, spot[2] * 0)
    torch.testing.assert_close(rotate(turned, shift), rotate(x, moved))
    same = rotate(x, moved) @ rotate(y, rotary.angles(spot[0] * 0 + delta, *spot[1:]))
    torch.testing.assert_close(same, turned @ rotate(y, rotary.angles(spot[0] * 0, *spot[1:])))


def test_wan_layout_at_128():
    rotary = Rotary(128)
    assert rotary.axes == (44, 42, 42)
    time, row, column = 7.0, 3.0, 11.0
    pairs = []
    for position, width in ((time, 44), (row, 42), (column, 42)):
        pairs += [position * 10000 ** (-2 * i / width) for i in range(width // 2)]
    x = torch.randn(128, dtype=torch.float64)
    z = torch.view_as_complex(x.view(-1, 2)) * torch.exp(
        1j * torch.tensor(pairs, dtype=torch.float64)
    )
    angles = rotary.angles(*(torch.tensor(p) for p in (time, row, column)))
    torch.testing.assert_close(rotate(x, angles), torch.view_as_real(z).flatten())


def test_bfloat16_comes_back():
    rotary = Rotary(64)
    x = torch.randn(50, 64).bfloat16()
    angles = rotary.angles(torch.arange(50), torch.zeros(50), torch.ones(50))
    back = rotate(rotate(x, angles), -angles)
    assert back.dtype == torch.bfloat16
    assert (back - x).abs().max() < 0.05


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 30), st.integers(0, 2**31))
def test_packing_is_exact(bits, width, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, width), generator=rng).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-width * bits // 8)
    assert torch.equal(unpack(packed, bits, width), codes.long())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(0, 1000))
def test_integer_codecs_are_right_to_half_a_step(name, seed):
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed))
    codec = CODECS[name].keys
    back = codec.decode(*codec.encode(x))
    step = x.abs().amax(-1, keepdim=True) / (2 ** (codec.bits - 1) - 1)
    assert bool(((back - x).abs() <= step / 2 + 1e-6).all())
