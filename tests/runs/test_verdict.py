"""Sentences about a comparison of video files."""

import re

import pytest

from lightning_kv.runs.verdict import FILES, verdict


def metric(mean=None, n=8, against=True, paired=None, ci95=None, **more):
    facts = {"mean": mean, "n": n, "against_reference": against, "paired": paired, "ci95": ci95}
    return facts | {"unit": "", "sets": False} | more


def change(difference, p):
    ci95 = [difference - 0.1, difference + 0.1]
    return {"difference": difference, "ci95": ci95, "p": p, "p_holm": p, "n": 8}


def said(metrics, drift=None, prompts=8):
    policies = {"full": {}, "mine": {"metrics": metrics, "drift": drift or {}}}
    family = {"level": 0.05, "tests": 3, "prompts": prompts, "prompts_needed": 7}
    summary = {"model": {"name": FILES}, "reference": "full", "policies": policies}
    return verdict(summary | {"family": family}, [])


def test_what_is_near_what_differs_and_what_does_not():
    words = said(
        {
            "psnr": metric(31.2, ci95=[30.0, 32.5], unit="dB"),
            "ssim": metric(None),
            "sharpness": metric(0.5, against=False, paired=change(-0.3, 0.01)),
            "colour": metric(0.5, against=False, paired=change(0.2, 0.06)),
            "flicker": metric(0.5, against=False, paired=change(0.2, None)),
        }
    )
    assert words == [
        "mine against full, over 8 prompts: psnr 31.2 dB [30, 32.5] (95 % intervals in brackets).",
        "mine differs from full in sharpness by -0.3 [-0.4, -0.2] (corrected p = 0.01) "
        "(sign-flip test, 5 % over 3 tests by Holm).",
        "mine: no sure difference in colour, flicker.",
    ]


def test_intervals_of_few_prompts_are_not_said_to_be_of_95_percent():
    (word,) = said({"psnr": metric(31.2, n=3, ci95=[30.0, 32.5])})
    assert word.endswith("psnr 31.2 [30, 32.5] (intervals sure to at most 75 % in brackets).")


def test_few_prompts_are_named_as_the_reason():
    colour = metric(0.5, n=3, against=False, paired=change(0.2, 0.25))
    (word,) = said({"colour": colour}, prompts=6)
    assert (
        word == "mine: no sure difference in colour; it takes 7 prompts or more to be sure of any."
    )


@pytest.mark.parametrize(("prompts", "few"), [(6, True), (7, False)])
def test_as_many_prompts_as_it_takes_are_not_few(prompts, few):
    colour = metric(0.5, n=prompts, against=False, paired=change(0.2, 0.25))
    (word,) = said({"colour": colour}, prompts=prompts)
    assert ("it takes 7 prompts or more" in word) == few


def test_drift_of_one_prompt_says_how_many_samples_it_is_of():
    ends = {"start_end": {"mean": 1.0, "ci95": None, "n": 1, "clips": 6}}
    (word,) = [w for w in said({"psnr": metric(30.0)}, {"psnr": ends}) if "15 %" in w]
    assert word.endswith("(1 prompt (6 samples)).")


def test_distances_of_sets():
    far = metric(12.5, against=False, sets=True, null=2.0) | {"against": "the real set"}
    far |= {"clips": 8, "windows": 16, "n_real": 1, "clips_real": 1, "windows_real": 5}
    words = said({"fvd": far, "kvd": far | {"mean": None}})
    assert words == [
        "mine: fvd 12.5, 16 windows of 8 prompts against the real set (5 windows of 1 clip); equal "
        "sets would show 2."
    ]


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.5), (-1.5, -0.5), (-0.5, 0.5)])
def test_drift_is_told_where_it_is_sure(low, high):
    ends = {"start_end": {"mean": (low + high) / 2, "ci95": [low, high]}}
    words = [word for word in said({"psnr": metric(30.0)}, {"psnr": ends}) if "15 %" in word]
    if low < 0 < high:
        assert words == []
    else:  # start - end: positive where it falls
        assert re.search("falls" if low > 0 else "rises", words[0])
        assert "by 1 from" in words[0] and "interval 0.5 to 1.5" in words[0]


def test_nothing_is_known():
    (word,) = said({"psnr": metric(None, n=0)})
    assert word.startswith("There is nothing to compare")
