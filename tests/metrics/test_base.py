"""The contract of metrics of a clip: blocks, values, units, what is kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.metrics.base import BLOCK, VideoMetric, read_clip
from lightning_kv.stats.bootstrap import bca_interval


class Level(VideoMetric):
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
    metric.curve(pixels(2 * BLOCK + 3), prompt="a cat", fps=4.0)
    assert metric.blocks == [(BLOCK, False), (BLOCK, False), (3, False)]
    assert metric.told == ("a cat", 4.0)


def grey(*levels, frames=2):
    return torch.tensor(levels).view(-1, 1, 1, 1, 1).expand(-1, frames, 3, 4, 4)


def test_a_clip_counts_once_and_one_without_a_value_not_at_all():
    metric = Level()
    metric.update(grey(0.25, 0.75), ids=["a", "b"])
    metric.update(grey(0.75, 0.5), ids=["b", "c"])
    assert metric.add(torch.full((3,), torch.nan), id="d") is None
    assert metric.compute() == 0.5 and metric.unit_values().tolist() != []
    assert Level().compute().isnan() and len(Level().unit_values()) == 0


def test_a_clip_that_comes_again_with_another_value_is_refused():
    metric = Level()
    metric.update(grey(0.25), ids=[7])
    metric.update(grey(0.5), ids=[7])
    with pytest.raises(ValueError, match=r"again with other values.*0\.5 after 0\.25.*own id"):
        metric.compute()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1),
    st.randoms(use_true_random=False),
)
def test_several_clips_of_a_unit_are_one_value_in_any_order(clips, random):
    by_unit = {}
    for unit, level in clips:
        by_unit.setdefault(unit, []).append(level)
    means = [sum(levels) / len(levels) for levels in by_unit.values()]
    random.shuffle(clips)
    metrics = [Level(), Level()]
    for place, (unit, level) in enumerate(clips):
        metrics[place % 2].add(torch.tensor([level]).double(), unit=f"prompt {unit}")
    metrics[0].merge_state(metrics[1])
    assert metrics[0].compute().item() == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert sorted(metrics[0].unit_values().tolist()) == pytest.approx(sorted(means), rel=1e-12)


def test_a_prompt_is_the_unit_unless_another_is_given():
    metric, other = Level(), Level()
    metric.update(grey(0.0, 0.5, 1.0), prompts=["a", "a", "b"])
    other.update(grey(0.0, 0.5, 1.0), prompts=["a", "a", "b"], units=torch.tensor([1, 2, 3]))
    assert (metric.compute(), other.compute()) == (0.625, 0.5)


def test_the_interval_is_that_of_the_units():
    metric = Level()
    levels = torch.linspace(0, 1, 24)
    metric.update(grey(*levels.tolist()), units=(torch.arange(24) // 2))
    expected = bca_interval(levels.double().view(12, 2).mean(1).tolist(), 0.9)
    assert metric.interval(0.9) == pytest.approx(expected, rel=1e-6)
    assert Level().interval() is None


def test_curves_are_kept_on_request():
    metric = Level(curves=True)
    metric.update([grey(0.25)[0], grey(0.5, frames=5)[0], grey(0.25)[0]], ids=[9, 3, 9])
    assert [curve.tolist() for curve in metric.curves] == [[0.5] * 5, [0.25] * 2]
    with pytest.raises(ValueError, match="'level' keeps no curves: curves=False"):
        _ = Level().curves


def test_what_was_added_after_compute_counts():
    metric = Level()
    metric.add(torch.tensor([0.5]).double())
    assert metric.compute() == 0.5
    metric.add(torch.tensor([1.0]).double())
    assert metric.compute() == 0.75


def test_what_was_saved_goes_on(recwarn):
    first, second = Level(), Level()
    first.update(grey(0.25))
    second.update(grey(1.0))
    for metric in (second, Level()):
        if metric is second:
            assert metric.compute() == 1  # which must not be remembered
        metric.load_state_dict(first.state_dict())
        assert metric.compute() == 0.25
        metric.update(grey(0.75))
        assert metric.compute() == 0.5 and first.compute() == 0.25
    assert not [w for w in recwarn if "before the ``update``" in str(w.message)]


def test_another_recipe_is_refused():
    class Other(Level):
        name, recipe = "other", "median"

    metric = Other()
    metric.update(grey(0.5))
    with pytest.raises(ValueError, match="'mean' cannot be counted by 'median'"):
        metric.load_state_dict(Level().state_dict())
    assert not metric.values
    with pytest.raises(ValueError, match="'median' cannot be counted by 'mean'"):
        Level().merge_state(metric)


def test_a_checkpoint_from_before_a_metric_was_added_is_loaded():
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1)})
    state = module.state_dict()
    module["metric"] = Level()
    found = module.load_state_dict(state, strict=True)
    assert not found.missing_keys and module["metric"].compute().isnan()


def test_prompts_can_be_places_in_a_table():
    class Told(Level):
        needs = ("pixels", "prompt")

    metric = Told(prompt_table=["a dog", "a cat"])
    metric.update(grey(0.5), prompts=torch.tensor([1]))
    assert metric.told == ("a cat", None)
    with pytest.raises(ValueError, match=r"prompts as places in a table.*prompt_table"):
        Told().update(grey(0.5), prompts=torch.tensor([1]))
    Level().update(grey(0.5), prompts=torch.tensor([1]))  # has no use for them


def test_paired_is_what_is_needed():
    class Far(VideoMetric):
        paired = True

        def frame_values(self, preds, target=None):
            return (preds - target).double().abs().mean((1, 2, 3))

    assert Far.needs == ("pixels", "reference_pixels") and Far.name == "far"
    assert Far.paired and Far.against_reference() and not Level.paired
    metric = Far()
    metric.update(grey(0.5), grey(0.25))
    assert metric.compute() == 0.25
    with pytest.raises(NotImplementedError, match="Bare writes neither"):
        type("Bare", (VideoMetric,), {})().update(grey(0.5))


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
