"""The shipped panorama encoder: its file, its shapes, and what its features tell apart."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import normalize

from lightning_kv.data.panorama import PALETTES, world_for
from lightning_kv.metrics.backbones import backbone
from lightning_kv.metrics.backbones.panorama_encoder import SHIPPED, PanoramaEncoder
from lightning_kv.metrics.functional.frechet import frechet_distance
from lightning_kv.models.embedded import WEIGHTS, load_embedded
from lightning_kv.tasks.pretrain_encoder import FIRST_WORLD
from lightning_kv.tasks.training.artefacts import IMAGE_ARTEFACTS, KINDS, draw_clip, look, way

CLIPS = 64


@pytest.fixture(scope="module")
def encoder():
    return backbone("panorama-encoder")


@pytest.fixture(scope="module")
def codec():
    return load_embedded(WEIGHTS / "panorama.safetensors", "cpu", "float32").codec


def world(seed):
    """A world of all sizes, speeds and palettes, with a seed that no training world has."""
    size, pace, palette = 4 + seed % 11, ("slow", "fast")[seed % 2], list(PALETTES)[seed % 4]
    return world_for(f"{palette} {pace} n{size} any", seed)


@pytest.fixture(scope="module")
def features(encoder, codec):
    """Clip features of 64 worlds from a first seed on, float64, has_comparison with artefacts."""

    def has_comparison(first, **strength):
        rng = torch.Generator().manual_seed(first)
        shots = [draw_clip(world(first + i), codec, rng, strength, 8) for i in range(CLIPS)]
        seen = codec.decode(codec.encode(torch.stack([shot.frames for shot in shots])))
        return encoder(seen).double()

    return has_comparison


def test_the_file_says_where_it_comes_from():
    with safe_open(SHIPPED, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["recipe"])["steps"] == int(metadata["steps"])
    assert json.loads(metadata["final_losses"])["loss"] > 0
    assert (metadata["license"], metadata["comparable"]) == ("Apache-2.0", "false")
    first, last = (int(seed) for seed in metadata["world_seeds"].split(" to "))
    recipe = json.loads(metadata["recipe"])
    assert first == FIRST_WORLD > 9999
    assert last - first + 1 == recipe["steps"] * recipe["worlds"]
    assert metadata["commit"]
    assert SHIPPED.stat().st_size <= 1_500_000


def test_it_is_found_by_name_and_knows_its_checksum(encoder):
    digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert isinstance(encoder, PanoramaEncoder)
    assert encoder.weights_sha256 == PanoramaEncoder.load(SHIPPED).weights_sha256 == digest
    assert encoder.comparable is False and encoder.takes_frames and encoder.clip_len == 8
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not encoder.network.training


def test_features_have_their_shapes_and_do_not_depend_on_the_neighbours(encoder):
    clips = torch.rand(5, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, frames = encoder(clips), encoder(clips[0])
    assert whole.shape == (5, 64) and frames.shape == (8, 64)
    assert torch.allclose(encoder(clips[2:3]), whole[2:3], atol=1e-5)
    assert torch.allclose(encoder(clips[0, 3:4]), frames[3:4], atol=1e-5)


def test_loading_draws_no_random_numbers():
    before = torch.get_rng_state()
    PanoramaEncoder.load()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(8, 3, 32, 40), (2, 7, 3, 32, 32), (3, 32, 32), (2, 1, 32, 32)])
def test_other_shapes_are_refused(encoder, shape):
    with pytest.raises(ValueError, match="cannot look at a block"):
        encoder(torch.zeros(shape))


def test_a_missing_cut_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no weights of the panorama encoder at"):
        PanoramaEncoder.load(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(SHIPPED.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"5000 bytes.*cannot be read"):
        PanoramaEncoder.load(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"holds no panorama encoder"):
        PanoramaEncoder.load(foreign)


@pytest.fixture(scope="module")
def clean(features):
    """A set of clean clips, and the largest distance of other clean sets to it."""
    first = features(10)
    return first, max(float(frechet_distance(first, features(seed))) for seed in (200, 400, 600))


@pytest.mark.parametrize("kind", KINDS)
def test_the_frechet_distance_grows_with_the_strength_of_an_artefact(clean, features, kind):
    first, null = clean
    far = [
        float(frechet_distance(first, features(2000, **{kind: strength})))
        for strength in (0.3, 0.6, 1.0)
    ]
    assert null < far[0] < far[1] < far[2] and far[1] > 4 * null


def test_frames_are_alike_by_the_share_of_the_screen_they_have_in_common(encoder, codec):
    def views_of(seed):
        return codec.decode(codec.encode(look(world(seed), way(world(seed), 1, 2))))

    views = torch.stack([views_of(seed) for seed in range(5000, 5040)])
    unit = normalize(encoder(views.flatten(0, 1)), dim=1).unflatten(0, views.shape[:2])
    fast = unit[1::2]  # odd seeds: neighbours share half of the screen
    half = (fast[:, 0] * fast[:, 1]).sum(1)
    assert half.mean() == pytest.approx(0.5, abs=0.1)
    others = unit[:, 0] @ unit[:, 0].T
    others = others[~torch.eye(len(others), dtype=torch.bool)]
    assert others.mean().abs() < 0.15 and others.quantile(0.95) < 0.5
    later = views[:, 0] + 0.02 * torch.randn(views[:, 0].shape, generator=rng(0))
    again = normalize(encoder(later.clamp(0, 1)), dim=1)
    assert (again * unit[:, 0]).sum(1).quantile(0.05) > 0.9


@pytest.mark.parametrize("kind", IMAGE_ARTEFACTS)
def test_a_damaged_frame_is_less_like_itself(encoder, codec, kind):
    likeness = []
    for strength in (0.2, 0.5, 1.0):
        shots = [
            [
                draw_clip(world(s), codec, rng(s), given, 8).frames
                for given in ({}, {kind: strength})
            ]
            for s in range(6000, 6008)
        ]
        clean, wrong = (
            normalize(encoder(torch.cat(frames)), dim=1) for frames in zip(*shots, strict=True)
        )
        likeness.append(float((clean * wrong).sum(1).mean()))
    assert 1 > likeness[0] > likeness[1] > likeness[2]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def test_enlarged_frames_are_the_same_frames(encoder):
    frames = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    large = frames.repeat_interleave(10, -1).repeat_interleave(10, -2)
    assert torch.allclose(encoder(large), encoder(frames), atol=1e-5)
