"""What users hand to a metric: labels, places in a table, arrays, and what is refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_kv.metrics import (
    PSNR,
    Brightness,
    FrechetVideoDistance,
    LatentMetric,
    LatentMSE,
    RetainedMass,
    VideoMetric,
)

GREY = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1, 1).expand(3, 2, 3, 16, 16)
LARGEST, NOBODYS = 2**63 - 1, -(2**63)


def shown(**labels):
    metric = Brightness()
    metric.update(GREY, **labels)
    return metric


def three_parts(error, wrong, given, works):
    text = str(error.value)
    assert text.index(wrong) >= 0 and given in text and works in text


def test_a_number_of_a_user_is_taken_for_no_other():
    """Levels 0, 0.5 and 1: two clips of a unit weigh half."""
    assert shown(units=[-1, -1, 2]).compute() == pytest.approx((0.25 + 1) / 2)
    metric = shown(ids=[-1, 0, 1])
    metric.update(GREY, ids=[-1, 0, 1])
    assert len(metric.unit_values()) == 3, "an id that comes twice counts once"
    for number in (LARGEST, NOBODYS + 1):
        metric = shown(ids=[number, 0, 1], units=[number, number, 0])
        assert metric.compute() == pytest.approx((0.25 + 1) / 2)


def test_a_number_of_a_set_is_taken_for_no_other():
    metric = FrechetVideoDistance(num_features=2)
    rows = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        metric.update_features(
            rows, real=False, ids=[-1, 0, 1, 2, 3, 4], units=[-1, -1, 0, 0, 1, 1]
        )
    metric.update_features(rows + 1, real=True)
    report = metric.report()
    assert (report.n, report.units, report.n_real, report.units_real) == (6, 3, 6, 6)
    assert report.value == pytest.approx(2, abs=1e-5), "the squared shift of the mean"


@pytest.mark.parametrize("number", [LARGEST + 1, NOBODYS, 2**70, -(2**64)])
def test_numbers_of_more_than_64_bits_are_refused(number):
    metric = Brightness()
    for call in (
        lambda: metric.update(GREY, ids=[0, 1, number]),
        lambda: metric.update(GREY, units=[0, 1, number]),
        lambda: metric.add(torch.ones(1), id=number),
    ):
        with pytest.raises(ValueError) as error:
            call()
        three_parts(error, "does not fit 64 bits", f"{number} was given", "Pass a number between")
        assert not metric.values, "nothing is left of a batch that was refused"


def test_arrays_are_labels():
    expected = shown(units=[4, 4, 7], ids=["a", "b", "c"])
    for units, ids in (
        (np.array([4, 4, 7]), np.array(["a", "b", "c"])),
        (np.array([4, 4, 7], dtype=np.uint8), np.array(["a", "b", "c"], dtype=object)),
        (list(np.array([4, 4, 7])), tuple(np.array(["a", "b", "c"]))),
    ):
        found = shown(units=units, ids=ids)
        assert found.compute() == expected.compute()
        for one, other in zip(found.ids + found.units, expected.ids + expected.units, strict=True):
            assert torch.equal(one, other)
    assert shown(prompts=np.array(["a", "a", "b"])).compute() == pytest.approx(0.625)
    assert shown(fps=np.array([8.0, 8, 24])).compute() == 0.5


@pytest.mark.parametrize(
    ("labels", "wrong", "given"),
    [
        ({"fps": "24"}, "fps does not fit 3 videos", "'24'"),
        ({"fps": ["24", 8, 8]}, "fps does not fit 3 videos", "'24'"),
        ({"fps": True}, "fps does not fit 3 videos", "True"),
        ({"fps": torch.ones(3, 1)}, "fps does not fit 3 videos", "tensor"),
        ({"fps": float("inf")}, "fps does not fit 3 videos", "inf"),
        ({"fps": {"rate": 8}}, "fps does not fit 3 videos", "rate"),
        ({"ids": 3}, "ids do not fit 3 videos", "3"),
        ({"ids": {"a", "b", "c"}}, "ids do not fit 3 videos", "{"),
        ({"ids": np.zeros(3)}, "ids do not fit 3 videos", "float64 (3,)"),
        ({"ids": np.zeros((3, 1), dtype=int)}, "ids do not fit 3 videos", "int64 (3, 1)"),
        ({"ids": [1, 2, True]}, "ids do not fit 3 videos", "True among them"),
        ({"ids": torch.tensor(3)}, "ids do not fit 3 videos", "torch.int64 ()"),
        ({"units": 7}, "units do not fit 3 videos", "7"),
        ({"units": "one"}, "units do not fit 3 videos", "'one'"),
        ({"units": b"one"}, "units do not fit 3 videos", "b'one'"),
        ({"prompts": "a cat"}, "prompts do not fit 3 videos", "'a cat'"),
        ({"prompts": 1.5}, "prompts do not fit 3 videos", "1.5"),
    ],
)
def test_labels_that_fit_nothing_are_refused_in_three_parts(labels, wrong, given):
    metric = Brightness()
    with pytest.raises(ValueError) as error:
        metric.update(GREY, **labels)
    three_parts(error, wrong, given, "Pass one ")
    assert not metric.values


class Told(VideoMetric):
    """Length of the prompt."""

    needs = ("pixels", "prompt")

    def reader(self, prompt=None, fps=None):
        return lambda pixels, _: torch.full((len(pixels),), float(len(prompt)))


TABLE = ["a dog", "a red fox"]


def test_a_prompt_is_one_unit_as_a_text_and_as_a_place():
    for kind in (Brightness, Told):
        metric, texts = kind(prompt_table=TABLE), kind()
        for at, place in enumerate([1, 0, 1]):
            clip = GREY[at : at + 1]
            texts.update(clip, prompts=[TABLE[place]])
            places = torch.tensor([place]) if at else [TABLE[place]]
            metric.update(clip, prompts=places)
        assert torch.equal(metric.unit_values(), texts.unit_values())
        assert len(metric.unit_values()) == 2
        mixed = kind(prompt_table=TABLE)
        mixed.update(GREY, prompts=["a red fox", 0, np.int64(1)])
        assert torch.equal(mixed.unit_values(), texts.unit_values())


@pytest.mark.parametrize("place", [-1, 2, 10])
def test_a_place_that_is_none_is_refused(place):
    for kind in (Brightness, Told):
        metric = kind(prompt_table=TABLE)
        with pytest.raises(ValueError) as error:
            metric.update(GREY, prompts=torch.tensor([0, 1, place]))
        three_parts(error, "there is no place", f"{place} in one of 2 texts", "places from 0 to 1")
        assert not metric.values


def test_arrays_are_no_videos_and_it_is_said_what_makes_them_some():
    array = GREY.numpy()
    for call in (
        lambda: PSNR().update(array, array),
        lambda: PSNR().update(list(array), list(array)),
        lambda: LatentMSE().update(array, array),
        lambda: LatentMSE().update(list(array), list(array)),
        lambda: RetainedMass().update(array[:, :, 0, 0, 0]),
        lambda: FrechetVideoDistance("random-2dconv").update(array, real=True),
        lambda: FrechetVideoDistance(num_features=3).update_features(array[:, 0, :, 0, 0], True),
    ):
        with pytest.raises(ValueError) as error:
            call()
        three_parts(error, "", "a numpy array (", "torch.from_numpy(array)")


@pytest.mark.parametrize(
    "call",
    [
        lambda: LatentMSE().update(torch.tensor(1.0), torch.tensor(1.0)),
        lambda: RetainedMass().update(torch.tensor(1.0)),
        lambda: RetainedMass().update(1.0),
        lambda: FrechetVideoDistance(num_features=3).update_features(3, True),
        lambda: FrechetVideoDistance(num_features=3).update_features([3], True),
    ],
)
def test_what_is_no_batch_at_all_is_refused_in_words(call):
    with pytest.raises(ValueError, match="Pass "):
        call()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (torch.tensor(0.5), "a tensor () of torch.float32"),
        (torch.ones(1), "a tensor (1,)"),
        (torch.ones(3), "a tensor (3,)"),
        (torch.ones(2, 1), "a tensor (2, 1)"),
        (0.5, "float 0.5"),
        (None, "NoneType None"),
        ([0.5, 0.5], "list [0.5, 0.5]"),
    ],
)
def test_a_metric_that_says_no_value_per_frame_is_named(said, words):
    class Glimmer(VideoMetric):
        def frame_values(self, preds, target=None):
            return said

    metric = Glimmer()
    with pytest.raises(ValueError) as error:
        metric.update(GREY)
    three_parts(error, "'glimmer' must say one value per frame", words, "Return a tensor [2]")
    assert "shown 2 frames" in str(error.value) and not metric.values


def test_a_metric_of_latents_that_says_no_value_per_frame_is_named():
    class Far(LatentMetric):
        measure = lambda preds, target: (preds - target).mean()  # noqa: E731

    with pytest.raises(ValueError, match=r"'far' must say one value per frame: .*2 frames.*\(\)"):
        Far().update(GREY, GREY)
