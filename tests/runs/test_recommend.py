"""Recommendations on hand-made runs whose answer is known."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_kv.metrics import METRICS
from lightning_kv.policies.budgets import read_memory
from lightning_kv.runs.analysis import analyse
from lightning_kv.runs.margins import read_margins
from lightning_kv.runs.recommend import recommend
from lightning_kv.runs.summary import MetricInfo, summarise
from lightning_kv.runs.verdict import verdict
from lightning_kv.tasks.measuring.adapter import Clip, measure

MIB = 2**20
INFO = {
    "psnr": MetricInfo("dB", True, "-", against_reference=True),
    "ssim": MetricInfo("", True, "-", against_reference=True, identical=1.0),
    "revisit_error": MetricInfo("", False, "-"),
    "recall": MetricInfo("share", True, "-"),
}


@dataclasses.dataclass
class Policy:
    """What a policy of a hand-made run measures on every prompt.

    ``recall`` and the other metrics are one number for all prompts or a list.
    """

    mib: float = 4.0
    reads: float = 1.0
    recall: float | list[float | None] = 1.0
    seconds: float = 0.05
    scored: float = 0.0
    other: dict = dataclasses.field(default_factory=dict)
    failed: tuple[int, ...] = ()
    config: dict = dataclasses.field(default_factory=dict)


def made(policies, prompts=16, measured=None):
    """Summary and records of a run of such policies, ``full`` first."""
    policies = {"full": Policy(), **policies}
    records = []
    for index in range(prompts if measured is None else measured):
        for name, policy in policies.items():
            fails = index in policy.failed
            values = {"recall": policy.recall, "revisit_error": None, "psnr": None, "ssim": None}
            values = {
                metric: value[index] if isinstance(value, list) else value
                for metric, value in (values | policy.other).items()
            }
            records.append(
                {
                    "policy": name,
                    "key": f"k{index:03d}",
                    "prompt": "-",
                    "metrics": dict.fromkeys(values) if fails else values,
                    "curves": {},
                    "failure": "it broke" if fails else None,
                    "cost": {
                        "kv_bytes_peak": int(policy.mib * MIB),
                        "kv_bytes_mean": policy.mib * MIB,
                        "kv_read_fraction": policy.reads,
                        "kv_scored_fraction": policy.scored,
                        "seconds_per_chunk": [policy.seconds],
                    },
                }
            )
    summary = summarise(
        records,
        reference="full",
        policies={name: policy.config for name, policy in policies.items()},
        metrics=INFO,
        run={"prompts": prompts, "frames": 48},
        model={"name": "panorama"},
        fingerprint="-",
        interval=lambda values: None,
    )
    return summary, records


def test_the_fewest_bytes_win_then_the_fewest_reads():
    run = made(
        {
            "small": Policy(mib=1.0, reads=0.9),
            "small-and-quick": Policy(mib=1.0, reads=0.4),
            "reads-little": Policy(mib=4.0, reads=0.1, seconds=0.02),
            "forgets": Policy(mib=0.5, reads=0.1, recall=0.5),
        }
    )
    found = recommend(*run)
    assert found.policy == "small-and-quick"
    assert found.runner_up == "small"
    assert found.fewest_reads == found.fastest == "reads-little"
    assert {one.policy: one.out for one in found.candidates} == {
        "small": None,
        "small-and-quick": None,
        "reads-little": None,
        "forgets": "margin",
    }
    text = " ".join(found.words)
    assert found.words[0].startswith("Run small-and-quick: it holds 1.00 MiB where full holds 4.00")
    assert "75 % less" in text and "reads 40 % of the rows" in text
    assert "forgets (recall 0.5 worse)" in text
    assert "2.50x speed" in text


def test_bytes_that_differ_by_less_than_a_percent_are_equal():
    run = made({"a": Policy(mib=2.0, reads=0.9), "b": Policy(mib=2.01, reads=0.2)})
    assert recommend(*run).policy == "b"


def test_one_that_only_reads_less_is_said_to_free_no_memory():
    config = {"select": {"part": "x", "budget": {"amount": "9f"}}, "retain": {"part": "y"}}
    run = made({"reader": Policy(reads=0.12, scored=0.8, seconds=0.1, config=config)})
    found = recommend(*run)
    assert found.of("reader").budgets == {"reads": "9f"}
    assert found.words[0] == (
        "Run reader (reads 9f per head): it frees no memory (4.00 MiB, as full) and reads 12 % of "
        "the rows."
    )
    assert "scores keys, 80 %" in found.words[1]
    assert "100 ms here, 2.00 times as long as full: it pays only where" in found.words[2]


def test_one_that_saves_nothing_is_not_recommended():
    found = recommend(*made({"same": Policy(), "more": Policy(mib=4.5)}))
    assert found.policy is None
    assert [one.out for one in found.candidates] == ["saves nothing"] * 2
    assert found.closest is None


def test_losses_are_paired_by_prompt():
    """The prompts differ far more than the policies do: only pairs can show a small loss."""
    recall = [0.1 + 0.05 * i for i in range(16)]
    run = made({"full": Policy(recall=recall), "a": Policy(1.0, recall=[x - 0.01 for x in recall])})
    (loss,) = recommend(*run).of("a").losses
    assert loss.mean == pytest.approx(0.01)
    assert loss.ci95 == pytest.approx((0.01, 0.01))
    assert loss.confidence == 1 - 0.5**16
    assert loss.value == pytest.approx(sum(recall) / 16 - 0.01)


def test_a_mean_within_the_margin_is_not_enough():
    """One prompt of 16 is lost: the mean loss is 0.0125, but two of them would be too many."""
    run = made({"a": Policy(1.0, recall=[0.8] + [1.0] * 15)})
    found = recommend(*run)
    assert found.policy is None and found.closest == "a"
    (loss,) = found.of("a").losses
    assert loss.within and found.of("a").out == "unsure"
    # A resampled set has that prompt Bin(16, 1/16) times, and keeps the margin with at most one.
    times = stats.binom(16, 1 / 16)
    bias = stats.norm.ppf(times.cdf(0) + times.pmf(1) / 2)
    lost = stats.skew([0.2] + [0.0] * 15) / (6 * math.sqrt(16))  # the acceleration of BCa
    z = stats.norm.ppf(times.cdf(1)) - bias
    expected = stats.t.cdf((z / (1 + lost * z) - bias) / math.sqrt(16 / 15), 15)
    assert loss.confidence == pytest.approx(expected, abs=0.02)
    assert "none is recommended" in found.words[0]
    assert recommend(*run, margins={"recall": 0.2}).policy == "a"


@pytest.mark.parametrize(("prompts", "sure"), [(1, False), (4, False), (5, True)])
def test_few_prompts_recommend_nothing(prompts, sure):
    found = recommend(*made({"a": Policy(mib=1.0)}, prompts=prompts))
    assert (found.policy == "a") == sure
    if not sure:
        assert found.closest == "a"
        assert "cannot give 95 % confidence" in found.words[0]
        assert "takes 5 prompts or more" in found.words[0]
        most = {1: "50 %", 4: "93 %"}[prompts]
        assert f"({most} is the most that so few can give)" in " ".join(found.words)


def test_a_metric_where_less_is_better():
    errors = {"good": 0.001, "bad": 0.01}
    run = made(
        {
            "full": Policy(recall=None, other={"revisit_error": 0.0005}),
            **{
                name: Policy(1.0, recall=None, other={"revisit_error": error})
                for name, error in errors.items()
            },
        }
    )
    found = recommend(*run)
    assert found.margins == {"revisit_error": 0.002}
    assert found.policy == "good"
    assert found.of("bad").losses[0].mean == pytest.approx(0.0095)


def test_a_gain_is_no_loss():
    run = made({"full": Policy(recall=0.5), "a": Policy(1.0, recall=0.75)})
    found = recommend(*run, margins={"recall": 0.0})
    assert found.policy == "a"
    assert "a gain of 0.25" in " ".join(found.words)


def test_every_margin_counts():
    run = made(
        {
            "a": Policy(1.0, other={"ssim": 0.9}),
            "b": Policy(2.0, other={"ssim": 0.99}),
        }
    )
    assert recommend(*run).policy == "a"
    found = recommend(*run, margins={"recall": 0.02, "ssim": 0.05})
    assert found.policy == "b"
    assert found.of("a").losses[1].reference == 1
    assert found.of("a").losses[1].mean == pytest.approx(0.1)


def test_too_little_memory_is_said():
    run = made({"a": Policy(2.0), "b": Policy(1.0, recall=0.5)})
    found = recommend(*run, memory=MIB // 2)
    assert (found.policy, found.closest) == (None, None)
    assert found.words[0] == "No policy fits into 512 KiB: the smallest, b, holds 1.00 MiB."
    found = recommend(*run, memory=int(1.5 * MIB))
    assert (found.policy, found.closest, found.beyond) == (None, "b", "a")
    assert "With more memory: a (2.00 MiB" in " ".join(found.words)
    assert "full itself holds 4.00 MiB, which does not fit." in found.words
    run = made({"b": Policy(1.0, recall=0.5)})
    assert "full itself holds 4.00 MiB, which fits." in recommend(*run, memory=5 * MIB).words


def test_failures_of_a_policy_count_against_it_those_of_the_reference_do_not():
    found = recommend(*made({"a": Policy(1.0, failed=(3,)), "b": Policy(2.0)}))
    assert found.policy == "b"
    assert found.of("a").out == "failed"
    assert "a (1 clip failed)" in " ".join(found.words)
    run = made({"full": Policy(failed=(3,)), "a": Policy(1.0, failed=(3,))})
    found = recommend(*run)
    assert found.policy == "a"
    assert found.of("a").losses[0].n == 15


def test_a_half_finished_run_is_said_to_be_one():
    summary, records = made({"a": Policy(1.0), "b": Policy(0.5)}, prompts=16, measured=7)
    records = [r for r in records if r["policy"] != "b" or r["key"] != "k006"]
    found = recommend(summary, records)
    assert found.measured == 6
    assert found.words[1] == "The run is not finished: 6 of 16 prompts."
    only_a = [r for r in records if r["policy"] != "b"]
    summary["policies"]["b"]["cost"] = dict.fromkeys(summary["policies"]["b"]["cost"])
    found = recommend(summary, only_a)
    assert found.of("b").out == "no values" and found.policy == "a"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.1, 6.0),
            st.floats(0.05, 1.2),
            st.lists(st.floats(0, 1), min_size=9, max_size=9),
        ),
        min_size=1,
        max_size=5,
    ),
    st.none() | st.floats(0.1, 6.0),
    st.floats(0, 0.5),
)
def test_nothing_over_the_limits_is_ever_recommended(policies, mib, margin):
    run = made(
        {f"p{i}": Policy(size, reads, recall) for i, (size, reads, recall) in enumerate(policies)},
        prompts=9,
    )
    memory = None if mib is None else int(mib * MIB)
    found = recommend(*run, memory, {"recall": margin})
    assert (found.policy is None) != (found.closest is None) or not any(
        one.out in ("unsure", "margin", None) for one in found.candidates
    )
    for name in filter(None, (found.policy, found.runner_up, found.fewest_reads, found.fastest)):
        size, reads, recall = policies[int(name[1:])]
        assert memory is None or int(size * MIB) <= memory
        assert math.fsum(1 - x for x in recall) / 9 <= margin + 1e-9
        assert size < 4.0 or reads < 1.0
    if found.policy:
        best = found.of(found.policy)
        for one in found.candidates:
            if one.out is None:
                assert best.bytes_share <= one.bytes_share + 0.01
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert all(isinstance(line, str) and line for line in found.words)


@pytest.mark.parametrize(
    ("margins", "text"),
    [
        ({"recal": 0.02}, "Did you mean 'recall'? Metrics that work here: recall"),
        ({"recall": -0.1}, "recall=-0.1 is no loss that could be allowed"),
        ({"recall": math.nan}, "0 or more"),
        ({"recall": math.inf}, "0 or more"),
        ({"psnr": 0.5}, "psnr compares with the reference rollout"),
        ({"ssim": 0.1}, "no prompt has a value of ssim"),
    ],
)
def test_margins_that_cannot_be_judged(margins, text):
    with pytest.raises(ValueError) as error:
        recommend(*made({"a": Policy(1.0, other={"psnr": 30.0})}), margins=margins)
    assert text in str(error.value)
    assert "recall" in str(error.value)


def test_a_run_that_says_nothing_is_said_to():
    with pytest.raises(ValueError, match="only the reference 'full' was run"):
        recommend(*made({}))
    with pytest.raises(ValueError, match="no margin to judge the loss by"):
        recommend(*made({"full": Policy(recall=None), "a": Policy(recall=None)}))
    summary, records = made({"a": Policy()})
    with pytest.raises(ValueError, match="nothing to compare yet: full"):
        recommend(summary, [r for r in records if r["policy"] == "full"])
    assert verdict(*made({}))[0].startswith("There is nothing to recommend")
    assert verdict(analyse(summary, records), records) == recommend(summary, records).words


def only(metric, values, identical, prompts=8, **more):
    """A run whose one metric with values compares with the reference, as a summary holds it."""
    other = {metric: values}
    summary, records = made(
        {
            "full": Policy(recall=None),
            "a": Policy(1.0, recall=None, other=other, **more),
        },
        prompts=prompts,
    )
    for policy in summary["policies"].values():
        policy["metrics"][metric]["identical"] = identical
    return summary, records


def test_psnr_alone_is_judged_against_what_identical_clips_have():
    """100 dB for identical clips: of 30 dB or more 70 dB or less are lost."""
    values = [33.0, 36.0, 34.0, 35.0, 33.5, 34.5, 35.5, 34.5]
    found = recommend(*only("psnr", values, 100.0))
    assert (found.policy, found.margins) == ("a", {"psnr": 70.0})
    (loss,) = found.of("a").losses
    assert loss.reference == 100 and loss.limit == 30
    assert loss.value == pytest.approx(sum(values) / 8)
    assert loss.mean == pytest.approx(100 - sum(values) / 8)
    assert "psnr is 34.5 against full, where two identical clips have 100, a loss of 65.5" in (
        " ".join(found.words)
    )
    far = recommend(*only("psnr", [value - 8 for value in values], 100.0))
    assert far.policy is None and far.closest == "a"
    assert far.words[0] == (
        "No policy keeps psnr at 30 or better with 95 % confidence, so none is recommended."
    )
    assert recommend(*only("psnr", values, 100.0), margins={"psnr": 64.0}).policy is None
    assert recommend(*only("psnr", values, 100.0), margins={"psnr": 67.0}).policy == "a"


def test_the_limit_of_a_metric_where_less_is_better_is_above(monkeypatch):
    monkeypatch.setitem(INFO, "lpips", MetricInfo("", False, "-", against_reference=True))
    (loss,) = recommend(*only("lpips", 0.05, 0.0), margins={"lpips": 0.1}).of("a").losses
    assert loss.limit == pytest.approx(0.1) and loss.mean == pytest.approx(0.05)


def test_without_what_identical_clips_have_psnr_alone_says_what_is_missing():
    run = only("psnr", 30.0, None)
    with pytest.raises(ValueError) as error:
        recommend(*run)
    wrong, given, works = re.split(r"(?<=\.) (?=It has|Evaluate)", str(error.value))
    assert wrong.startswith("There is no margin to judge the loss by")
    assert "psnr (it compares with full, and what two identical clips have" in given
    assert works == "Evaluate with another metric too, such as --metrics [recall,ssim]."
    assert "no metric" not in str(error.value).lower(), "psnr has values"
    assert str(error.value) in verdict(analyse(*run), run[1])


def test_every_reason_why_values_cannot_be_judged_is_said(monkeypatch):
    monkeypatch.setitem(INFO, "brightness", MetricInfo("", None, "-"))
    monkeypatch.setitem(INFO, "fvd", MetricInfo("", False, "-", sets=True))
    summary, records = only("brightness", 0.5, None)
    summary["policies"]["a"]["metrics"]["fvd"]["mean"] = 3.0
    with pytest.raises(ValueError) as error:
        recommend(summary, records)
    assert "brightness (neither more nor less of it is better)" in str(error.value)
    assert "fvd (it compares sets, so no prompt has a value)" in str(error.value)
    assert "psnr (" not in str(error.value), "it has no values"


def test_a_metric_without_a_default_is_named_with_how_to_ask_for_it(monkeypatch):
    monkeypatch.setitem(INFO, "psnr_mean", MetricInfo("dB", True, "-", against_reference=True))
    run = only("psnr_mean", 35.0, 100.0)
    with pytest.raises(ValueError, match=r"psnr_mean\. Write --margin psnr_mean=NUMBER"):
        recommend(*run)
    assert recommend(*run, margins={"psnr_mean": 70.0}).policy == "a"


def test_margins_and_memory_as_people_write_them():
    assert read_margins("recall=0.02, ssim=0.1") == {"recall": 0.02, "ssim": 0.1}
    assert read_margins(None) is read_memory(None) is None
    assert read_memory("24GiB") == 24 * 2**30 and read_memory("1.5KiB") == 1536


@pytest.mark.parametrize("text", ["recall", "recall=", "recall=few", "recall=1,recall=2", ""])
def test_unreadable_margins(text):
    with pytest.raises(ValueError, match="--margin"):
        read_margins(text)


@pytest.mark.parametrize("text", ["24", "24GB", "much", "0GiB", "-1GiB", "9f", "0.5"])
def test_unreadable_memory(text):
    with pytest.raises(ValueError, match="Write 24GiB"):
        read_memory(text)


def test_identical_clips_measure_what_is_said_of_them():
    import torch

    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 4, 4, generator=rng)
    pixels = torch.rand(4, 3, 192, 192, generator=rng)
    clip = Clip(latents, pixels, latents, pixels)
    alike = {name: kind for name, kind in METRICS.items() if kind.against_reference()}
    endless = {"psnr", "psnr_mean", "latent_snr", "divergence_onset"}
    assert {name for name, kind in alike.items() if kind.identical is None} <= endless | {"lpips"}
    for name, kind in alike.items():
        if kind.identical is not None and not hasattr(kind, "backbones"):
            found = measure({name: kind()}, clip).values[name]
            assert found == pytest.approx(kind.identical, abs=1e-6), name


def test_confidences_are_corrected_for_the_number_of_policies():
    """Six clips give one policy 98.4 %; the least sure of two policies has half the doubt left."""
    alone = recommend(*made({"a": Policy(1.0)}, prompts=6)).of("a").losses[0].confidence
    assert alone == pytest.approx(1 - 0.5**6)
    both = recommend(*made({"a": Policy(1.0), "b": Policy(2.0)}, prompts=6))
    assert [both.of(name).losses[0].confidence for name in "ab"] == [1 - 2 * 0.5**6] * 2
    many = recommend(*made({f"p{i}": Policy(1.0) for i in range(4)}, prompts=6))
    assert many.policy is None and {one.out for one in many.candidates} == {"unsure"}


def test_a_policy_that_scores_all_it_does_not_read_is_no_saving():
    """It reads a quarter and keeps the quality, but meets every key once more to choose."""
    found = recommend(*made({"picky@9f": Policy(reads=0.26, scored=1.0)}))
    assert found.policy is None and found.of("picky@9f").out == "saves nothing"
    assert found.of("picky@9f").keeps
    assert "picky@9f would keep it, but read and score as much as full" in found.words[0]
    cheap = recommend(*made({"picky@9f": Policy(reads=0.26, scored=0.3)}))
    assert cheap.policy == "picky@9f"
