"""Artefacts: what they do to pictures and to the way of the camera, and what is said about them."""

import pytest
import torch

from lightning_kv.data.panorama import SKYLINE, world_for
from lightning_kv.models.embedded import WEIGHTS, load_embedded
from lightning_kv.tasks.training.artefacts import (
    IMAGE_ARTEFACTS,
    KINDS,
    MOTION_ARTEFACTS,
    draw_clip,
    look,
    way,
)


@pytest.fixture(scope="module")
def codec():
    return load_embedded(WEIGHTS / "panorama.safetensors", "cpu", "float32").codec


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("text", ["dusk fast n13 any", "mist slow n4 any", "noon fast n4 left"])
def test_a_clean_clip_is_what_the_world_renders(codec, text):
    world = world_for(text, 3)
    x = way(world, world.phase, 20)
    assert torch.equal(look(world, x), world.render(20))
    clip = draw_clip(world, codec, rng(), {}, 8)
    seen = world_for(text, 3).strip()[:, :, int(clip.x[5]) : int(clip.x[5]) + 32]
    alone = codec.decode(codec.encode(seen))  # the clip goes through the codec as one batch
    assert (clip.frames[5] - alone).abs().max() < 2e-6 < 1e-2 < (clip.frames[4] - alone).abs().max()
    assert clip.strength.tolist() == [0.0] * len(KINDS) and clip.intact.tolist() == [1.0] * 8


@pytest.mark.parametrize("kind", IMAGE_ARTEFACTS)
def test_wrong_pictures_grow_with_the_strength_and_leave_the_camera_alone(codec, kind):
    def spoilt(strength, seed):
        return draw_clip(world_for("dusk fast n9 any", seed), codec, rng(seed), strength, 8)

    errors = []
    for strength in (0.02, 0.3, 1.0):
        pairs = [(spoilt({}, seed), spoilt({kind: strength}, seed)) for seed in range(8)]
        for clean, clip in pairs:
            assert torch.equal(clean.x, clip.x)
            assert clip.intact.tolist() == pytest.approx([1 - strength / 2] * 8)
            assert clip.strength[KINDS.index(kind)] == pytest.approx(strength)
            assert clip.strength.count_nonzero() == 1
        errors.append(sum(float((c.frames - s.frames).square().mean()) for c, s in pairs) / 8)
    assert errors[0] < 0.1 * errors[2] and errors[0] < errors[1] < errors[2]
    assert errors[2] > 1e-3


def test_wrong_pictures_may_begin_late(codec):
    world = world_for("dusk fast n9 any", 1)
    clean = draw_clip(world, codec, rng(), {}, 8)
    late = draw_clip(world, codec, rng(), {"saturation": 0.8}, 8, onset=True)
    wrong = (clean.frames != late.frames).flatten(1).any(1)
    first = int(wrong.int().argmax())
    assert 1 <= first <= 6 and wrong[first:].all() and not wrong[:first].any()
    assert (late.intact < 1).tolist() == wrong.tolist()
    assert late.strength.sum() == pytest.approx(0.8 * (8 - first) / 8)


def test_wrong_columns_leave_the_ruler_alone(codec):
    world = world_for("dusk fast n9 any", 1)
    clean, clip = (draw_clip(world, codec, rng(), s, 8) for s in ({}, {"columns": 1.0}))
    assert torch.equal(clean.frames[:, :, SKYLINE:], clip.frames[:, :, SKYLINE:])
    assert not torch.equal(clean.frames, clip.frames)


def paths(kind, strength, text="dusk fast n9 any", clips=40):
    world = world_for(text, 0)
    for seed in range(clips):
        right = way(world, seed % world.prompt.period, 8)
        yield right, MOTION_ARTEFACTS[kind](right, strength, world, rng(seed))


@pytest.mark.parametrize(("strength", "still"), [(0.01, 1), (0.5, 4), (1.0, 7)])
def test_a_frozen_camera_stands_still_for_so_many_steps(strength, still):
    ends = set()
    for right, x in paths("freeze", strength):
        extra = int((x.diff() == 0).sum()) - still  # 1 where it is caught up after a turn
        assert extra in (0, 1)
        ends.add(bool(x[-1] == right[-1]))
    assert ends == ({True, False} if still < 7 else {False})


@pytest.mark.parametrize(("strength", "jumps"), [(0.01, 1), (0.5, 2), (1.0, 4)])
def test_a_jumping_camera_is_elsewhere_in_so_many_frames(strength, jumps):
    for right, x in paths("jump", strength, "noon slow n5 any"):
        assert int((x != right).sum()) == jumps
        assert x.min() >= 0 and x.max() <= 32 and bool((x % 8 == 0).all())


@pytest.mark.parametrize(("strength", "wrong"), [(0.01, 1), (0.5, 4), (1.0, 7)])
@pytest.mark.parametrize("text", ["dusk fast n14 any", "dusk slow n14 any"])
def test_a_camera_of_wrong_speed_keeps_the_right_one_before(strength, wrong, text):
    stride = {"fast": 16, "slow": 8}[text.split()[1]]
    widths = set()
    for right, x in paths("speed", strength, text):
        assert torch.equal(x[: 8 - wrong], right[: 8 - wrong])
        assert x.min() >= 0 and x.max() <= 13 * stride
        pace = x.diff().abs()[7 - wrong :]
        widths |= {int(pace.mode().values)} if wrong > 1 else set(pace.tolist())
        assert int((pace == stride).sum()) <= 2  # steps around a wall
    assert {4, 12, 24} <= widths


@pytest.mark.parametrize(("strength", "turns"), [(0.01, 1), (1.0, 3)])
def test_a_flipping_camera_turns_back_away_from_the_walls(strength, turns):
    found = []
    for _, x in paths("flip", strength):
        assert set(x.diff().abs().tolist()) == {16} and x.min() >= 0 and x.max() <= 8 * 16
        inner = (x[1:-1] > 0) & (x[1:-1] < 8 * 16)
        found.append(int((inner & (x.diff().sign().diff() != 0)).sum()))
    # A turn that falls on a wall waits for the next frame, and is lost after the last.
    assert set(found) <= {turns - 1, turns} and found.count(turns) > 0.7 * len(found)
