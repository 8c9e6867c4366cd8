"""The Wan VAE frame by frame, against the library's decoder of whole clips."""

import sys

import pytest
import torch

from lightning_kv.models.vae import WanVAE

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1, -0.5, 1.0, 0.3],
    "latents_std": [2.0, 1.5, 0.7, 1.1],
}

# Frame by frame and whole are two ways of computing: kernels add up in the order that the CPU and
# the sizes call for. Of pixels in [0, 1], either way is up to 2e-6 (16 eps of float32) and 0.03
# (4 eps of bfloat16) from the same network in float64. One feature lost at a seam moves 0.1.
ROUNDING, ROUNDING_HALF, LOST = 5e-6, 0.04, 0.1


def build(**changes):
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(**(SMALL | changes)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return build()


def latents(frames, *, clips=1, channels=4, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(clips, frames, channels, 3, 2, generator=rng)


def difference(found, expected):
    assert found.shape == expected.shape
    return (found - expected).abs().max()


def whole(vae, z):
    """The library's decode of whole clips, [B, F, C, h, w] to [B, T, 3, H, W] in [0, 1]."""
    mean, std = (torch.tensor(vae.config[f"latents_{n}"]).view(-1, 1, 1) for n in ("mean", "std"))
    raw = (z * std + mean).movedim(2, 1).to(vae.dtype)
    return (vae.decode(raw).sample.clamp(-1, 1).float() * 0.5 + 0.5).movedim(1, 2)


@pytest.mark.parametrize("parts", [(7,), (1,) * 7, (3, 3, 1), (2, 1, 4)])
def test_parts_join_to_the_whole(vae, parts):
    z = latents(7)
    decoder = WanVAE(vae).open()
    found = [decoder.push(part) for part in z[0].split(parts)]
    assert difference(torch.cat(found)[None], whole(vae, z)) < ROUNDING
    assert torch.equal(torch.cat(found), torch.cat(list(WanVAE(vae).stream(z[0]))))
    assert [len(part) for part in found] == [
        4 * n - (3 if i == 0 else 0) for i, n in enumerate(parts)
    ]


def test_a_stream_gives_one_frame_then_four(vae):
    z = latents(4)
    found = list(WanVAE(vae).stream(z[0]))
    assert [len(part) for part in found] == [1, 4, 4, 4]
    assert difference(torch.cat(found)[None], whole(vae, z)) < ROUNDING


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("float32", ROUNDING), ("bfloat16", ROUNDING_HALF)]
)
def test_rounding_hides_no_lost_feature(dtype, rounding):
    net, z = build().to(getattr(torch, dtype)), latents(7)
    right, lost = whole(net, z)[0], []
    codec = WanVAE(net)
    for place in range(len(codec.open().features)):
        decoder = codec.open()
        found = [decoder.push(z[0, :3])]
        if isinstance(decoder.features[place], torch.Tensor):  # the shortcuts keep nothing
            decoder.features[place].zero_()
            found.append(decoder.push(z[0, 3:]))
            lost.append(difference(torch.cat(found), right))
    assert len(lost) > 10 and min(lost) > LOST > 2 * rounding


def test_no_frames_are_lost_at_seams(vae):
    z = latents(7)
    cleared = torch.cat([whole(vae, part) for part in z.split([3, 4], dim=1)], dim=1)
    codec = WanVAE(vae)
    assert cleared.shape[1] == 22  # what clearing the features between parts gives
    assert codec.decode(z).shape[1] == codec.pixel_frames(7) == 25


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decode_is_the_whole_decode_clip_by_clip(vae, frames):
    z = latents(frames, clips=2)
    found = WanVAE(vae).decode(z)
    assert found.shape == (2, 1 + 4 * (frames - 1), 3, 12, 8) and found.dtype == torch.float32
    assert difference(found, torch.cat([whole(vae, clip) for clip in z.split(1)])) < ROUNDING
    assert found.std() > 0.01 and found.min() >= 0 and found.max() <= 1


def test_published_shape_of_the_network():
    big = build(
        dim_mult=[1, 2, 4, 4],
        temperal_downsample=[False, True, True],
        z_dim=16,
        num_res_blocks=2,
        latents_mean=list(range(16)),
        latents_std=[1.0 + i / 8 for i in range(16)],
    )
    codec = WanVAE(big)
    assert codec.stride == (4, 8)
    assert len(codec.open().features) == 33  # causal convolutions of the published decoder
    z = latents(3, channels=16)
    assert difference(codec.decode(z), whole(big, z)) < ROUNDING


def test_number_format_of_the_weights_is_kept(vae):
    half = build().to(torch.bfloat16)
    z = latents(3)
    found = WanVAE(half).decode(z)
    assert difference(found, whole(half, z)) < ROUNDING_HALF and found.dtype == torch.float32
    assert difference(WanVAE(half).decode(z.bfloat16()), found) < 0.05


def test_what_is_held_does_not_grow(vae):
    decoder, seen = WanVAE(vae).open(), []
    for latent in latents(9)[0].split(1):
        decoder.push(latent)
        seen.append(decoder.held_bytes)
    assert seen[0] > 0 and len(set(seen[2:])) == 1


def test_clips_do_not_share_features(vae):
    codec, (a, b) = WanVAE(vae), latents(4, clips=2)
    first, second = codec.open(), codec.open()
    mixed = [(first.push(x), second.push(y)) for x, y in zip(a.split(2), b.split(2), strict=True)]
    for clip, parts in zip((a, b), zip(*mixed, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), codec.open().push(clip))
        assert difference(torch.cat(parts)[None], whole(vae, clip[None])) < ROUNDING


def test_encode_gives_the_normalised_mode(vae):
    pixels = torch.rand(2, 9, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    found = WanVAE(vae).encode(pixels)
    assert found.shape == (2, 3, 4, 3, 2) and found.dtype == torch.float32
    mode = vae.encode(pixels[1:].movedim(2, 1) * 2 - 1).latent_dist.mean[0]  # [C, F, h, w]
    for channel, (mean, std) in enumerate(
        zip(SMALL["latents_mean"], SMALL["latents_std"], strict=True)
    ):
        assert (found[1, :, channel] - (mode[channel] - mean) / std).abs().max() < 1e-6


def test_gradients_are_neither_kept_nor_switched_off_for_others():
    trained = build().requires_grad_(True)
    codec = WanVAE(trained)
    for part in codec.stream(latents(2)[0]):
        assert torch.is_grad_enabled() and not part.requires_grad


@pytest.mark.parametrize("shape", [(1, 8, 3, 12, 8), (1, 9, 3, 13, 8), (9, 3, 12, 8)])
def test_pixels_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(ValueError, match=r"cannot be encoded. Give .* 1, 5, 9, .* multiples of 4"):
        WanVAE(vae).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 4, 3, 2), (1, 0, 4, 3, 2), (1, 2, 5, 3, 2)])
def test_latents_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(ValueError, match=r"cannot be decoded. Give \["):
        WanVAE(vae).decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_residual": True}, "is_residual=True"),
        ({"patch_size": 2, "in_channels": 12, "out_channels": 12}, "patch_size=2"),
        ({"temperal_downsample": [False, True]}, r"temperal_downsample=\[False, True\]"),
    ],
)
def test_other_kinds_are_refused_in_words(change, said):
    with pytest.raises(ValueError, match=rf"{said}.*Use the VAE of Wan2.1"):
        WanVAE(build(**change))


def test_a_folder_is_loaded(tmp_path, vae):
    vae.save_pretrained(tmp_path / "vae")
    codec = WanVAE.load(tmp_path / "vae", "cpu", torch.float32)
    assert torch.equal(codec.decode(latents(3)), WanVAE(vae).decode(latents(3)))
    assert difference(codec.decode(latents(3)), whole(vae, latents(3))) < ROUNDING
    assert not any(p.requires_grad for p in codec.parameters()) and not codec.vae.training
    half = WanVAE.load(tmp_path / "vae", "cpu", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_folder_without_a_vae_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no readable config.json. Give the vae/ folder"):
        WanVAE.load(tmp_path, "cpu", torch.float32)
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(ValueError, match=r"is of WanTransformer3DModel. Give the vae/ folder"):
        WanVAE.load(tmp_path, "cpu", torch.float32)


def test_damaged_weights_are_refused(tmp_path, vae):
    from safetensors.torch import load_file, save_file

    vae.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors, such as decoder.conv_out.weight"):
        WanVAE.load(tmp_path, "cpu", torch.float32)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        WanVAE.load(tmp_path, "cpu", torch.float32)


def test_a_missing_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "lightning_kv\[wan\]"'):
        WanVAE.load(tmp_path, "cpu", torch.float32)
