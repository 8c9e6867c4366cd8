"""Memory and camera metrics against drawn worlds, whose codes are known, and plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.data import panorama as world_of
from lightning_kv.metrics import metric_by_name
from lightning_kv.metrics.base import clip_value
from lightning_kv.metrics.functional import (
    camera_rule,
    decode_columns,
    decode_positions,
    first_visit,
    fit_positions,
    last_seen,
)
from lightning_kv.metrics.panorama import (
    CameraRule,
    Recall,
    RecallFar,
    RevisitError,
    RulerError,
    Scene,
)
from lightning_kv.models.codec import PatchCodec

NAMES = ("revisit_error", "recall", "recall_far", "ruler_error", "camera_rule")
FRAMES, CONTEXT = 72, 15


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    tiles = torch.cat([world_of.column_tiles(name) for name in world_of.PALETTES])
    skyline = tiles.unfold(2, 8, 8).permute(0, 2, 1, 4, 3).flatten(0, 1)
    ground = world_of.ruler(32).unfold(2, 8, 8).permute(2, 0, 1, 3)
    return PatchCodec.fit(torch.cat([skyline, ground]), channels=16)


def draw(text: str, seed: int) -> world_of.World:
    prompt = world_of.PanoramaPrompt.parse(text)
    return world_of.draw_world(prompt, torch.Generator().manual_seed(seed))


def scene_of(world: world_of.World, codec: PatchCodec, frames: int = FRAMES) -> Scene:
    prompt = world.prompt
    codes = codec.encode(world_of.column_tiles(prompt.palette)).squeeze(-1)
    ground = codec.encode(world_of.ruler(prompt.columns)).squeeze(1)
    rulers = torch.stack(
        [ground[:, prompt.stride * p : prompt.stride * p + 4] for p in range(prompt.size)]
    )
    pixels = world.render(frames)
    truth = {"truth_pixels": pixels, "truth_latents": codec.encode(pixels)}
    return Scene(codes, rulers, prompt.size, world.positions(frames), **truth)


def free(scene: Scene) -> Scene:
    return replace(scene, positions=None, truth_pixels=None, truth_latents=None)


Clip = tuple[torch.Tensor, torch.Tensor, Scene, int]
"""Latents, pixels, scene, and how many frames were given."""


def clip_of(pixels: torch.Tensor, codec: PatchCodec, scene: Scene, context: int = CONTEXT) -> Clip:
    return codec.encode(pixels), pixels, scene, context


def shown(metric, clip: Clip, **labels) -> None:
    latents, pixels, scene, given = clip
    metric.update(latents[None], pixels[None], scene, given=given, **labels)


def values(clip: Clip) -> dict[str, float | None]:
    return {name: clip_value(m.curve(*clip)) for name, m in metric_by_name(NAMES).items()}


PERFECT = {
    "revisit_error": 0.0,
    "recall": 1.0,
    "recall_far": 1.0,
    "ruler_error": 0.0,
    "camera_rule": 1.0,
}


@pytest.mark.parametrize("text", ["dusk fast n13 left", "mist slow n7 any", "noon fast n10 any"])
@pytest.mark.parametrize("known", [True, False])
def test_the_world_itself_is_perfect(codec, text, known):
    world = draw(text, 1)
    scene = scene_of(world, codec)
    clip = clip_of(world.render(FRAMES), codec, scene if known else free(scene), CONTEXT * known)
    assert values(clip) == pytest.approx(PERFECT, abs=1e-9)


@pytest.mark.parametrize("palette", world_of.PALETTES)
def test_columns_and_positions_are_decoded_through_noise(codec, palette):
    world = draw(f"{palette} fast n13 any", 2)
    scene = scene_of(world, codec)
    noise = torch.randn(scene.truth_latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = scene.truth_latents + 0.05 * noise
    assert torch.equal(decode_columns(noisy, scene.code_book), world.visible_codes(FRAMES))
    assert torch.equal(decode_positions(noisy, scene.ruler_book), world.positions(FRAMES))


@pytest.mark.parametrize("seed", range(3))
def test_another_world_of_the_prompt_is_at_chance(codec, seed):
    world, other = draw("night fast n13 left", seed), draw("night fast n13 left", seed + 10)
    clip = clip_of(other.render(FRAMES), codec, scene_of(world, codec))
    right = world.visible_codes(FRAMES) == other.visible_codes(FRAMES)  # integers, no decoding
    got = values(clip)
    assert got["recall"] == pytest.approx(right[CONTEXT:].double().mean().item(), abs=1e-12)
    assert got["recall"] < 0.3
    error = other.render(FRAMES).double() - world.render(FRAMES).double()
    expected = error[CONTEXT:, :, :24].square().mean().item()
    assert got["revisit_error"] == pytest.approx(expected, rel=1e-12)
    assert got["ruler_error"] == pytest.approx(0.0, abs=1e-9)  # the camera does nothing wrong
    assert got["camera_rule"] == 1.0


def test_a_world_that_agrees_with_itself_only_is_right_in_free_generation(codec):
    world, other = draw("night fast n13 any", 3), draw("night fast n13 any", 4)
    scene = free(scene_of(world, codec))
    assert values(clip_of(other.render(FRAMES), codec, scene, 0)) == pytest.approx(
        PERFECT, abs=1e-9
    )


def test_a_held_camera_breaks_its_rule(codec):
    world = draw("dusk fast n10 left", 5)
    pixels = world.render(FRAMES)
    pixels[30:] = pixels[30]
    clip = clip_of(pixels, codec, scene_of(world, codec))
    positions = world.positions(FRAMES).tolist()
    kept = sum(positions[f] == positions[min(f, 30)] for f in range(CONTEXT, FRAMES))
    got = values(clip)
    assert got["camera_rule"] == pytest.approx(kept / (FRAMES - CONTEXT), abs=1e-12)
    assert got["camera_rule"] < 0.5
    assert got["ruler_error"] > 0.1


def test_a_shuffled_camera_breaks_its_rule_and_not_its_memory(codec):
    world = draw("dusk fast n10 left", 6)
    order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))
    clip = clip_of(world.render(FRAMES)[order], codec, free(scene_of(world, codec)), 0)
    got = values(clip)
    assert got["camera_rule"] < 0.5
    assert got["recall"] == 1.0
    assert got["revisit_error"] == pytest.approx(0, abs=1e-9)  # its views are decoded one by one


def test_ruler_error_is_the_distance_to_the_expected_ground(codec):
    world = draw("mist slow n8 left", 7)
    scene = scene_of(world, codec)
    latents = scene.truth_latents.clone()
    latents[40, :, 3] = scene.ruler_book[5]
    latents[:, :, :3] += 1  # the skyline plays no part
    curve = RulerError().curve(latents, scene.truth_pixels, scene, CONTEXT)
    expected_ground = scene.ruler_book[world.positions(FRAMES)[40]].double()
    expected = (scene.ruler_book[5].double() - expected_ground).square().mean().item()
    assert expected > 0.1
    assert curve[40].item() == pytest.approx(expected, rel=1e-12)
    others = torch.cat([curve[CONTEXT:40], curve[41:]])
    assert others.max() < 1e-9


def hand_made(codec: PatchCodec) -> tuple[Clip, list[int]]:
    """A free generation that wanders: some columns change on the way back, and so do pixels."""
    world = draw("noon fast n6 left", 8)
    scene = scene_of(world, codec, world.prompt.size)
    positions = [0, 1, 2, 1, 0, 3, 4, 5, 4, 3, 2, 2, 0, 1, 5]
    latents = scene.truth_latents[positions].clone()
    pixels = scene.truth_pixels[positions].clone()
    generator = torch.Generator().manual_seed(9)
    for frame in (3, 4, 9, 10, 12, 14):
        column = int(torch.randint(4, (), generator=generator))
        latents[frame, :, :3, column] = scene.code_book[(5 * frame) % 24]
        pixels[frame] = (pixels[frame] + 0.02 * frame).clamp(0, 1)
    return (latents, pixels, free(scene), 4), positions


def test_free_generation_is_the_plain_loop(codec):
    clip, positions = hand_made(codec)
    latents, pixels, scene, given = clip
    codes = decode_columns(latents, scene.code_book).tolist()
    curves = {name: metric.curve(*clip).tolist() for name, metric in metric_by_name(NAMES).items()}
    checked = 0
    for frame, position in enumerate(positions):
        earlier = [f for f in range(frame) if positions[f] == position]
        if not earlier or frame < given:
            assert all(curves[name][frame] != curves[name][frame] for name in NAMES[:3])
            continue
        target = earlier[0]
        error = (pixels[frame, :, :24].double() - pixels[target, :, :24].double()) ** 2
        share = sum(a == b for a, b in zip(codes[frame], codes[target], strict=True)) / 4
        assert curves["revisit_error"][frame] == pytest.approx(error.mean().item(), rel=1e-12)
        assert curves["recall"][frame] == share
        far = curves["recall_far"][frame]
        assert far == share if frame - earlier[-1] >= 9 else far != far
        checked += 1
    assert checked >= 7
    assert 0 < clip_value(Recall().curve(*clip)) < 1
    assert not RecallFar().curve(*clip).isnan().all()


def test_with_a_truth_the_rule_says_which_frames_are_revisits(codec):
    # The generated ground row is wrecked: a camera that is lost does not hide what is forgotten.
    world = draw("dusk fast n13 left", 9)
    scene = scene_of(world, codec)
    latents = scene.truth_latents.clone()
    latents[:, :, 3] = 0
    clip = (latents, scene.truth_pixels, scene, CONTEXT)
    gap = last_seen(world.positions(FRAMES))
    assert torch.equal(RecallFar().curve(*clip).isnan()[CONTEXT:], gap[CONTEXT:] < 9)
    assert not Recall().curve(*clip)[CONTEXT:].isnan().any()


def test_a_clip_without_revisits_has_no_value(codec):
    world = draw("dusk fast n13 left", 10)
    clip = clip_of(world.render(12), codec, free(scene_of(world, codec, 12)), 0)
    metric = Recall()
    shown(metric, clip)
    assert clip_value(metric.curve(*clip)) is None
    assert metric.compute().isnan() and not metric.values
    assert values(clip)["camera_rule"] == 1.0


@pytest.mark.parametrize("metric", [RevisitError, Recall, RulerError, CameraRule])
def test_uneven_shards_merge_by_addition(codec, metric):
    clips = []
    for seed in range(4):
        world, other = draw("dusk fast n7 any", seed), draw("dusk fast n7 any", seed + 20)
        scene = scene_of(world, codec, 30 + seed)
        clips.append(clip_of(other.render(30 + seed), codec, scene))
    expected = sum(clip_value(metric().curve(*clip)) for clip in clips) / len(clips)
    left, right = metric(), metric()
    shown(left, clips[0])
    right.update(
        [latents for latents, *_ in clips[1:]],
        [pixels for _, pixels, *_ in clips[1:]],
        [scene for _, _, scene, _ in clips[1:]],
        given=CONTEXT,
    )
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [4, 5, 13])
def test_the_start_is_read_off_the_first_frames(codec, size):
    for phase in range(2 * (size - 1)):
        world = replace(draw(f"mist fast n{size} any", 11), phase=phase)
        scene = scene_of(world, codec, 30)
        latents = scene.truth_latents.clone()
        latents[12:] = 0  # later frames have no say
        latents += 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(phase))
        assert torch.equal(fit_positions(latents, scene.ruler_book), world.positions(30))


def test_a_start_that_is_known_is_not_fitted(codec):
    late = replace(draw("dusk fast n7 left", 13), phase=2)
    known = replace(late, phase=0).positions(FRAMES)
    scene = free(scene_of(late, codec))
    pixels = late.render(FRAMES)
    right = (known == late.positions(FRAMES)).double().mean().item()
    assert values(clip_of(pixels, codec, scene, 0))["camera_rule"] == 1.0
    got = values(clip_of(pixels, codec, replace(scene, positions=known), 0))
    assert got["camera_rule"] == pytest.approx(right, abs=1e-12)
    assert got["recall"] == 1.0


@given(st.integers(0, 40), st.integers(1, 60), st.integers(2, 14))
def test_the_rule_is_that_of_the_world(start, frames, size):
    expected = world_of.bounce(torch.arange(start, start + frames), size)
    assert torch.equal(camera_rule(start, frames, size), expected)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_visits_are_the_plain_loops(places):
    seen, first = [], []
    for frame, place in enumerate(places):
        earlier = [f for f in range(frame) if places[f] == place]
        seen.append(frame - earlier[-1] if earlier else -1)
        first.append(places.index(place))
    assert last_seen(torch.tensor(places)).tolist() == seen
    assert first_visit(torch.tensor(places)).tolist() == first


def test_errors_say_what_was_given_and_what_would_work(codec):
    world = draw("dusk fast n7 left", 12)
    scene = scene_of(world, codec, 20)
    latents, pixels = scene.truth_latents, scene.truth_pixels
    for call, words in (
        (lambda: replace(scene, size=8), ("7 rows for 8", "one row for each")),
        (lambda: replace(scene, truth_latents=None), ("[20, 20, None]", "all three")),
        (lambda: replace(scene, positions=None), ("[None, 20, 20]", "all three")),
        (
            lambda: shown(Recall(), (latents[:9], pixels[:9], scene, 0)),
            ("'scene.positions': 20", "same"),
        ),
        (lambda: shown(Recall(), (latents[:9], pixels, free(scene), 0)), ("'pixels': 20", "same")),
        (lambda: shown(Recall(), (latents, pixels, scene, 21)), ("21 were given", "at most")),
        (lambda: shown(Recall(), (latents, pixels, [scene] * 2, 0)), ("2 scenes", "as many of")),
        (lambda: shown(Recall(), (latents / 0, pixels, scene, 0)), ("finite", "failed")),
        (lambda: shown(Recall(), (latents, pixels * 9, scene, 0)), ("out of range", "divide")),
        (lambda: Recall().update(latents[None], pixels[None], None), ("a scene", "Scene")),
    ):
        with pytest.raises(ValueError) as error:
            call()
        for word in words:
            assert word in str(error.value)
