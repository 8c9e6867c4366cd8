"""The panorama world against slow twins: a camera that walks, tiles looked up one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.data.panorama import (
    CODES,
    COLUMN,
    LEFT_WALL,
    PALETTES,
    REPEAT,
    RIGHT_WALL,
    SIZES,
    SKYLINE,
    SPEEDS,
    STARTS,
    VISIBLE,
    PanoramaPrompt,
    bounce,
    column_tiles,
    draw_prompt,
    phrase_table,
    ruler,
    ruler_code,
    world_for,
)

texts = st.builds(
    "{} {} n{} {}".format,
    st.sampled_from(tuple(PALETTES)),
    st.sampled_from(tuple(SPEEDS)),
    st.sampled_from(SIZES),
    st.sampled_from(STARTS),
)
seeds = st.integers(0, 2**63 - 1)


def walk(size: int, steps: int) -> list[tuple[int, int]]:
    """Positions and directions of a camera that walks right and turns at both ends."""
    place, direction, seen = 0, 1, []
    for _ in range(steps):
        if not 0 <= place + direction < size:
            direction = -direction
        seen.append((place, direction))
        place += direction
    return seen


@pytest.mark.parametrize("size", SIZES)
def test_bounce_is_a_walk_that_turns_at_the_ends(size):
    expected = [place for place, _ in walk(size, 100)]
    assert bounce(torch.arange(100), size).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(texts, seeds)
def test_camera_repeats_after_one_period_and_not_before(text, seed):
    world = world_for(text, seed)
    period, size = world.prompt.period, world.prompt.size
    assert 0 <= world.phase < period
    route = walk(size, 4 * period)[world.phase :]
    assert world.positions(3 * period).tolist() == [place for place, _ in route[: 3 * period]]
    assert route[period : 2 * period] == route[:period]
    assert len(set(route[:period])) == period


@settings(deadline=None, max_examples=40)
@given(texts, seeds)
def test_screen_shows_the_tiles_of_its_codes(text, seed):
    world = world_for(text, seed)
    frames = world.prompt.period
    video, visible = world.render(frames), world.visible_codes(frames)
    tiles = column_tiles(world.prompt.palette)
    assert video.shape == (frames, 3, 32, 32)
    assert visible.shape == (frames, VISIBLE)
    for frame, codes in zip(video, visible.tolist(), strict=True):
        for column, code in enumerate(codes):
            on_screen = frame[:, :SKYLINE, COLUMN * column : COLUMN * (column + 1)]
            assert torch.equal(on_screen, tiles[code])


@settings(deadline=None, max_examples=40)
@given(texts, seeds)
def test_ruler_on_screen_is_that_of_the_camera_position(text, seed):
    world = world_for(text, seed)
    ground = world.render(5)[:, :, SKYLINE:]
    for row, position in zip(ground, world.positions(5).tolist(), strict=True):
        start = COLUMN * world.prompt.stride * position
        assert torch.equal(row, ruler(world.prompt.columns)[:, :, start : start + 32])


def test_ruler_paints_the_fourier_code_of_x():
    painted = ruler(6)
    for x in range(48):
        code = ruler_code(torch.tensor(float(x - x % 4))) * 0.45 + 0.5
        assert torch.allclose(painted[:, 0, x], code[:3])
        assert torch.allclose(painted[:, 7, x], code[3:])


def test_ruler_tells_all_camera_positions_apart():
    widest = VISIBLE + max(SPEEDS.values()) * (max(SIZES) - 1)
    codes = ruler_code(torch.arange(0, COLUMN * widest, COLUMN, dtype=torch.float32))
    distance = torch.cdist(codes, codes) + 10 * torch.eye(widest)
    assert distance.min() > 0.5


@settings(deadline=None, max_examples=40)
@given(texts, seeds)
def test_world_is_walls_around_buildings_and_stays_in_range(text, seed):
    world = world_for(text, seed)
    assert world.codes[0] == LEFT_WALL
    assert world.codes[-1] == RIGHT_WALL
    assert world.codes[1:-1].max() < LEFT_WALL
    assert len(world.codes) == world.prompt.columns
    strip = world.strip()
    assert strip.shape == (3, 32, COLUMN * world.prompt.columns)
    assert strip.min() >= 0
    assert strip.max() <= 1


def test_all_tiles_of_a_palette_differ():
    for palette in PALETTES:
        tiles = column_tiles(palette).flatten(1)
        assert len(torch.unique(tiles, dim=0)) == CODES


def test_same_seed_same_world_and_other_seed_other_world():
    text = "mist fast n14 any"
    torch.manual_seed(1)
    once = world_for(text, 5)
    torch.manual_seed(2)
    again, other = world_for(text, 5), world_for(text, 6)
    assert torch.equal(once.codes, again.codes)
    assert once.phase == again.phase
    assert not torch.equal(once.codes, other.codes)


def test_drawing_a_world_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    world_for("mist fast n14 any", 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_columns_repeat_their_neighbour_as_often_as_they_should():
    codes = torch.stack([world_for("dusk fast n14 any", seed).codes for seed in range(400)])
    inner = codes[:, 1:-1]
    same = (inner[:, 1:] == inner[:, :-1]).double().mean().item()
    assert same == pytest.approx(REPEAT + (1 - REPEAT) / 24, abs=0.02)


def test_start_left_is_the_left_wall_and_any_is_anywhere():
    left = {world_for("noon slow n5 left", seed).phase for seed in range(60)}
    anywhere = {world_for("noon slow n5 any", seed).phase for seed in range(200)}
    assert left == {0}
    assert anywhere == set(range(8))


@given(texts)
def test_prompt_text_survives_parsing(text):
    assert PanoramaPrompt.parse(text).text == text
    assert PanoramaPrompt.parse(f"  {text.replace(' ', '   ')} ").text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dusk",
        "dusk fast n13",
        "dusk fast n13 left left",
        "fast dusk n13 left",
        "dusk fast n3 left",
        "dusk fast n15 left",
        "dusk fast 13 left",
        "Dusk fast n13 left",
        "a cat on a mat",
    ],
)
def test_prompt_of_another_world_is_refused(text):
    with pytest.raises(ValueError, match="does not understand") as error:
        world_for(text, 0)
    assert repr(text) in str(error.value)
    assert "Try 'dusk fast n13 left'" in str(error.value)


def test_drawn_prompts_can_be_read_back_and_cover_the_sizes():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_prompt(generator, (5, 7)) for _ in range(200)]
    assert all(PanoramaPrompt.parse(prompt.text) == prompt for prompt in drawn)
    assert {prompt.size for prompt in drawn} == {5, 6, 7}


def test_phrase_table_tells_all_words_and_pairs_apart():
    table = phrase_table()
    assert len(table) == 19 + 2 * 11
    assert len({tuple(state) for state in table.values()}) == len(table)
    assert {len(state) for state in table.values()} == {25}
