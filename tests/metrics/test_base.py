"""The contract of metrics of a clip: parts that fit, blocks, context, sums."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.metrics.base import BLOCK, Clip, PixelMetric, clip_value, read_clip


class Level(PixelMetric):
    """Brightness of every frame, and how many blocks came."""

    name, unit, higher_is_better, recipe = "level", "", None, "mean"

    def reader(self, prompt=None, fps=None):
        self.told, self.blocks = (prompt, fps), []

        def read(pixels, reference):
            self.blocks.append((len(pixels), reference is not None))
            return pixels.double().mean((1, 2, 3))

        return read


def pixels(frames):
    levels = torch.arange(1.0, frames + 1) / (frames + 1)
    return levels.view(-1, 1, 1, 1).expand(frames, 3, 4, 4)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 9))
def test_pixel_frames_that_show_one_latent_frame_are_averaged(frames, stride, context):
    context = min(context, frames)
    shown = pixels(1 + (frames - 1) * stride)
    curve = Level().curve(Clip(torch.zeros(frames, 1, 1, 1), shown, context=context))
    means = shown.mean((1, 2, 3)).double()
    groups = [means[:1], *means[1:].split(stride)] if frames > 1 else [means]
    for place, (value, group) in enumerate(zip(curve, groups, strict=True)):
        assert value.isnan() if place < context else value == pytest.approx(group.mean().item())
    value = clip_value(curve)
    assert (value is None) == (context == frames)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_curve_does_not_depend_on_the_blocks(sizes):
    shown, metric = pixels(sum(sizes)), Level()
    blocks = [(block, block) for block in shown.split(sizes)]
    found = read_clip({"x": metric, "y": Level()}, iter(blocks), "a cat", 8.0)
    # Sums are formed in another order where fewer frames come at a time; frames are 0.01 apart.
    torch.testing.assert_close(found["x"], shown.double().mean((1, 2, 3)), rtol=1e-12, atol=0)
    assert found["x"].dtype == torch.float64 and set(found) == {"x", "y"}
    assert metric.told == ("a cat", 8.0) and metric.blocks == [(n, True) for n in sizes]


def test_a_clip_is_shown_in_small_blocks():
    metric = Level()
    metric.curve(Clip(pixels=pixels(2 * BLOCK + 3), prompt="a cat", fps=4.0))
    assert metric.blocks == [(BLOCK, False), (BLOCK, False), (3, False)]
    assert metric.told == ("a cat", 4.0)


def test_sums_merge_by_addition():
    clips = [Clip(pixels=level * torch.ones(2, 3, 4, 4)) for level in (0.25, 0.5, 0.75)]
    whole, parts = Level(), [Level(), Level()]
    for place, clip in enumerate(clips):
        whole.update(clip)
        parts[place % 2].update(clip)
    whole.update(Clip(pixels=torch.ones(2, 3, 4, 4), context=2))  # nothing counts
    assert whole.compute() == 0.5 and whole.clips == 3
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == 0.5
    assert Level().compute().isnan()


def test_what_was_saved_goes_on(recwarn):
    first, second = Level(), Level()
    first.update(Clip(pixels=0.25 * torch.ones(2, 3, 4, 4)))
    second.update(Clip(pixels=torch.ones(2, 3, 4, 4)))
    for metric in (second, Level()):
        if metric is second:
            assert metric.compute() == 1  # which must not be remembered
        metric.load_state_dict(first.state_dict())
        assert metric.compute() == 0.25
        metric.update(Clip(pixels=0.75 * torch.ones(2, 3, 4, 4)))
        assert metric.compute() == 0.5 and first.compute() == 0.25
    assert not [w for w in recwarn if "before the ``update``" in str(w.message)]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "shows nothing"),
        ({"latents": torch.zeros(3, 1, 1, 1), "pixels": pixels(2)}, "differ in length"),
        ({"latents": torch.zeros(3, 1, 1, 1), "pixels": pixels(6)}, "differ in length"),
        ({"pixels": pixels(3), "reference_pixels": pixels(4)}, "differ in length"),
        ({"pixels": pixels(3), "context": 4}, "context does not fit"),
        ({"pixels": pixels(3), "context": -1}, "context does not fit"),
        ({"pixels": pixels(3) / 0}, r"NaN or infinite values in \['pixels'\]"),
        ({"latents": torch.full((2, 1, 1, 1), torch.nan)}, r"in \['latents'\]"),
    ],
)
def test_parts_that_do_not_fit(parts, said):
    with pytest.raises(ValueError, match=said):
        Clip(**parts)


def test_what_a_metric_lacks_is_named():
    with pytest.raises(ValueError, match=r"'level' cannot be computed: .* without pixels"):
        Level().curve(Clip(torch.zeros(2, 1, 1, 1)))


def test_one_metric_with_a_problem_leaves_the_others():
    class Picky(Level):
        def reader(self, prompt=None, fps=None):
            if prompt is None:
                raise ValueError("It must be told something.")
            read = super().reader(prompt, fps)

            def once(block, reference):
                if self.blocks:
                    raise ValueError("One block is enough.")
                return read(block, reference)

            return once

    blocks, problems = [(block, None) for block in pixels(6).split(2)], {}
    for prompt, why in ((None, "It must be told something."), ("a cat", "One block is enough.")):
        found = read_clip({"x": Picky(), "y": Level()}, blocks, prompt, problems=problems)
        assert list(found) == ["y"] and len(found["y"]) == 6 and problems == {"x": why}
        with pytest.raises(ValueError, match=why):
            read_clip({"x": Picky(), "y": Level()}, blocks, prompt)


def test_a_clip_that_cannot_be_read_is_no_problem_of_a_metric():
    def blocks():
        yield pixels(2), None
        raise ValueError("The file ends early.")

    problems = {}
    with pytest.raises(ValueError, match="ends early"):
        read_clip({"x": Level()}, blocks(), problems=problems)
    assert problems == {}
