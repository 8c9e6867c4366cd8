"""The gate against hand-made summaries whose verdict is known."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from lightning_kv.cli import main
from lightning_kv.runs.check import PASS, REGRESSION, THIN, check
from lightning_kv.stats.inference import non_inferiority

FACTS = {
    "recall": (True, False),
    "revisit_error": (False, False),
    "ssim": (True, True),
    "brightness": (None, False),
    "fvd/i3d": (False, False),
}


def summary(policies, reference="full", recipe="as ever"):
    """What the gate reads of a ``summary.json``; values are one list per policy and metric."""
    return {
        "reference": reference,
        "policies": {
            name: {
                "metrics": {
                    metric: {
                        "recipe": f"{metric} {recipe}",
                        "higher_is_better": FACTS[metric][0],
                        "against_reference": FACTS[metric][1],
                        "status": "ok",
                    }
                    for metric in metrics
                },
                "units": {
                    f"k{i}": {metric: own[i] for metric, own in metrics.items()}
                    for i in range(max(map(len, metrics.values())))
                },
            }
            for name, metrics in policies.items()
        },
    }


@pytest.fixture
def files(tmp_path):
    """Writes a run and a baseline."""

    def write(new, old):
        for name, content in (("new", new), ("old", old)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content, allow_nan=False))
        return tmp_path / "new.json", tmp_path / "old.json"

    return write


def base(n=8):
    return [0.9 + 0.01 * i for i in range(n)]


@pytest.mark.parametrize(
    ("metric", "change", "code"),
    [
        ("recall", -0.01, PASS),
        ("recall", +0.5, PASS),
        ("recall", -0.03, REGRESSION),
        ("revisit_error", +0.03, REGRESSION),
        ("revisit_error", -0.5, PASS),
        ("revisit_error", +0.01, PASS),
    ],
)
@pytest.mark.parametrize("n", [8, 4])
def test_the_three_exit_codes(files, metric, change, code, n):
    new = [value + change for value in base(n)]
    paths = files(summary({"a": {metric: new}}), summary({"a": {metric: base(n)}}))
    found = check(*paths, {metric: 0.02})
    assert found.code == (code if n == 8 else THIN)  # 0.5**4 > 5 %, whatever the values
    (test,) = found.tests
    assert test.found.mean == pytest.approx(change if metric == "revisit_error" else -change)
    assert len(found.words) == 3 and all(line and "\n" not in line for line in found.words)
    if n == 4:
        assert test.needed == 5 and "about 1 prompt more would settle it" in found.words[2]


def test_a_run_equals_itself(files):
    own = summary({"full": {"recall": base(5)}, "a": {"recall": base(5)[::-1]}})
    found = check(*files(own, own))
    assert found.code == PASS and {test.verdict for test in found.tests} == {"not worse"}
    assert (
        found.words[0].startswith("PASS: nothing is worse") and "(2 tests, 95 %" in found.words[0]
    )
    assert "equal, margin 0.02" in found.words[1] or "equal [0, 0], margin 0.02" in found.words[1]
    assert check(*files(own, own), {"recall": 0.0}).code == PASS
    few = summary({"a": {"recall": base(4)}})
    assert check(*files(few, few)).code == THIN


def test_losses_at_the_margin_are_settled_by_no_number(files):
    new = [value - loss for value, loss in zip(base(6), [0.0, 0.04] * 3, strict=True)]
    paths = files(summary({"a": {"recall": new}}), summary({"a": {"recall": base(6)}}))
    found = check(*paths, {"recall": 0.02})
    assert found.code == THIN
    # the mean is at the margin up to rounding: no number of prompts anyone could run
    assert found.tests[0].needed is None
    assert "no number of prompts settles it" in found.words[2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beyond", [False, True])
def test_the_number_of_prompts_that_would_settle_it(files, seed, beyond):
    """With about that many prompts like these, the gate decides in four of five runs."""
    rng, margin = np.random.default_rng(seed), 0.02
    loss = rng.normal(0, 0.03, 6)
    mean = 0.03 if beyond else 0.005
    loss = mean + 0.03 * (loss - loss.mean()) / loss.std(ddof=1)
    new = summary({"a": {"recall": (np.full(6, 0.9) - loss).tolist()}})
    found = check(*files(new, summary({"a": {"recall": [0.9] * 6}})), {"recall": margin})
    (test,) = found.tests
    assert test.verdict == "unclear" and test.needed > 6
    sigma = np.std(loss, ddof=1)
    draws = rng.normal(mean, sigma, (20_000, test.needed))
    side = "greater" if beyond else "less"

    def power(n):
        return (
            stats.ttest_1samp(draws[:, :n], margin, axis=1, alternative=side).pvalue < 0.05
        ).mean()

    assert power(test.needed) == pytest.approx(0.8, abs=0.03) or test.needed == 7
    assert power(test.needed) > 0.77 and power(max(2, test.needed * 2 // 3)) < 0.77
    wanted = "worse" if beyond else "not worse"
    decided = [non_inferiority(row, margin, resamples=500).verdict == wanted for row in draws[:300]]
    assert np.mean(decided) > 0.7
    assert f"about {test.needed - 6} prompt" in found.words[2]


@pytest.mark.parametrize("losses", [[0.05, 0.0, 0.0, 0.0, 0.0, 0.0], [0.01], [0.0, 0.03], [0.5]])
def test_more_prompts_are_always_more_than_there_are(files, losses):
    new = [0.9 - loss for loss in losses]
    paths = files(summary({"a": {"recall": new}}), summary({"a": {"recall": [0.9] * len(new)}}))
    found = check(*paths, {"recall": 0.02})
    (test,) = found.tests
    assert found.code == THIN and test.needed > len(losses)
    assert f"about {test.needed - len(losses)} prompt" in found.words[2]


def test_one_regression_among_passes_and_doubts_decides(files):
    old = {"recall": base(8), "revisit_error": [0.1] * 8}
    new = {
        "good": old,
        "poor": {"recall": [v - 0.5 for v in base(8)], "revisit_error": [0.1] * 8},
        "odd": {"recall": [v - 0.03 * (i % 2) for i, v in enumerate(base(8))]}
        | {"revisit_error": [0.1] * 8},
    }
    paths = files(summary(new), summary(dict.fromkeys(new, old)))
    found = check(*paths, {"recall": 0.02, "revisit_error": 0.01})
    assert found.code == REGRESSION and len(found.tests) == 6
    assert [test.verdict for test in found.tests][:2] == ["worse", "unclear"]
    assert "1 of 6 tests" in found.words[0] and "poor recall: 0.5 worse" in found.words[1]
    assert check(*paths, {"recall": 0.02}, ["odd", "good"]).code == THIN
    assert check(*paths, {"recall": 0.02}, ["good"]).code == PASS


def test_a_clip_that_fails_now_is_a_regression(files):
    new = [None, *base(8)[1:]]
    old = [*base(8)[:-1], None]  # it failed then, and does not count now
    paths = files(summary({"a": {"recall": new}}), summary({"a": {"recall": old}}))
    found = check(*paths)
    assert found.code == REGRESSION and found.tests[0].failed == 1
    assert "1 prompt without a value now" in found.words[1]
    assert found.tests[0].found.n == 6


@pytest.mark.parametrize("margins", [None, {"recall": 0.02}])
def test_a_run_in_which_everything_fails_is_a_regression(files, margins):
    paths = files(summary({"a": {"recall": [None] * 8}}), summary({"a": {"recall": base(8)}}))
    found = check(*paths, margins)
    assert found.code == REGRESSION and found.tests[0].found is None
    assert "a recall: no value now on 8 prompts" in found.words[1]


def test_prompts_that_are_missing_are_counted_over_all_policies(files):
    old = {"a": {"recall": base(8)}, "b": {"recall": base(8)}}
    new = summary(old)
    del new["policies"]["b"]["units"]["k3"], new["policies"]["b"]["units"]["k7"]
    found = check(*files(new, summary(old)))
    assert found.code == THIN and found.missing == 2, "a gate must not reward gaps"
    assert found.words[0].startswith("INCOMPLETE")
    assert "2 prompts of the baseline missing" in found.words[2]
    none = copy.deepcopy(new)
    for policy in none["policies"].values():
        policy["units"] = {f"other {key}": value for key, value in policy["units"].items()}
    with pytest.raises(ValueError, match="No prompt has a value of recall under a in both"):
        check(*files(none, summary(old)), {"recall": 0.02})


def test_the_reference_is_not_compared_with_itself(files):
    own = {
        "full": {"ssim": [None] * 8, "recall": base(8)},
        "a": {"ssim": base(8), "recall": base(8)},
    }
    paths = files(summary(own), summary(own))
    tests = check(*paths, {"ssim": 0.02, "recall": 0.02}).tests
    assert sorted((test.policy, test.metric) for test in tests) == [
        ("a", "recall"),
        ("a", "ssim"),
        ("full", "recall"),
    ]
    with pytest.raises(ValueError, match="No prompt has a value of ssim under full"):
        check(*paths, {"ssim": 0.02}, ["full"])
    twice = own | {"full": {"ssim": [1.0] * 8, "recall": base(8)}}  # it was rolled out again
    worse = own | {"full": {"ssim": [0.9] * 8, "recall": base(8)}}
    found = check(*files(summary(worse), summary(twice)), {"ssim": 0.02})
    assert found.code == REGRESSION and found.tests[0].policy == "full"


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        (
            {"recal": 0.02},
            r"'recal', which not both have\. Did you mean 'recall'\? Both have recall",
        ),
        ({"zzz": 0.02}, r"'zzz', which not both have\. Both have recall, brightness"),
        ({"recall": -0.1}, "Give 0 or more"),
        ({"recall": math.nan}, "Give 0 or more"),
        ({"recall": math.inf}, "Give 0 or more"),
        ({"brightness": 0.1}, "neither more nor less of brightness is better"),
        ({"fvd/i3d": 1.0}, "Distances between sets have no value by prompt"),
    ],
)
def test_margins_that_mean_nothing(files, margins, said):
    own = summary({"a": {"recall": base(), "brightness": base(), "fvd/i3d": [None] * 8}})
    with pytest.raises(ValueError, match=said):
        check(*files(own, own), margins)


def test_other_recipes_references_and_policies(files):
    own = {"a": {"recall": base(), "ssim": base()}}
    with pytest.raises(ValueError, match="recall was computed in another way"):
        check(*files(summary(own), summary(own, recipe="of old")), {"recall": 0.02})
    other = files(summary(own), summary(own, reference="half"))
    with pytest.raises(ValueError, match="compares with 'full' in the run and with 'half'"):
        check(*other, {"ssim": 0.02})
    assert check(*other, {"recall": 0.02}).code == PASS
    apart = files(summary(own | {"new": own["a"]}), summary(own | {"old": own["a"]}))
    assert {test.policy for test in check(*apart).tests} == {"a"}
    for names in (["new"], ["a", "old"], []):
        with pytest.raises(ValueError, match=r"not in both.*The run has a, new; the baseline"):
            check(*apart, policies=names)
    nothing = files(summary({"new": own["a"]}), summary({"old": own["a"]}))
    with pytest.raises(ValueError, match="These policies are not in both: new"):
        check(*nothing)
    with pytest.raises(ValueError, match="There is no margin to judge the loss by"):
        check(*files(*[summary({"a": {"brightness": base()}})] * 2))


@pytest.mark.parametrize("level", [0.0, 1.0, 2.0])
def test_levels_that_are_none(files, level):
    own = summary({"a": {"recall": base()}})
    with pytest.raises(ValueError, match=f"confidence level of {level}"):
        check(*files(own, own), level=level)


def test_a_higher_level_asks_for_more(files):
    own = summary({"a": {"recall": base(6)}})
    paths = files(own, own)
    assert [check(*paths, level=level).code for level in (0.95, 0.98, 0.99)] == [PASS, PASS, THIN]
    assert check(*paths, level=0.99).tests[0].needed == 7  # 1 - 0.5**7 > 0.99


@pytest.mark.parametrize("text", ["", "[]", "3", '{"policies": []}', '{"policies": {"a": {}}}'])
def test_what_is_no_summary(files, tmp_path, text):
    own = summary({"a": {"recall": base()}})
    new, old = files(own, own)
    old.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json is no summary.*Give a directory or summary"):
        check(new, old)
    with pytest.raises(ValueError, match=r"is no summary.*FileNotFoundError"):
        check(new, tmp_path)
    old.write_text(json.dumps(summary({})))
    with pytest.raises(ValueError, match="holds no values"):
        check(new, old)


def test_the_command(files, capsys):
    old = summary({"a": {"recall": base()}})
    codes = {0.0: 0, -0.5: 1}
    for change, code in codes.items():
        new = summary({"a": {"recall": [value + change for value in base()]}})
        words = ["check", *map(str, files(new, old)), "--margin", "recall=0.02"]
        words.insert(2, "--baseline")
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code and len(capsys.readouterr().out.strip().splitlines()) == 3
        with pytest.raises(SystemExit) as stop:
            main([*words, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert stop.value.code == found["code"] == code and len(found["words"]) == 3
        assert found["tests"][0]["verdict"] == ("worse" if code else "not worse")
        assert found["tests"][0]["found"]["mean"] == pytest.approx(-change)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--margin", "recall"])
    assert stop.value.code == 2 and "METRIC=NUMBER" in capsys.readouterr().err


def test_the_exit_code_reaches_the_shell(files):
    own = summary({"a": {"recall": base(3)}})
    new, old = files(own, own)
    words = [sys.executable, "-m", "lightning_kv", "check", str(new), "--baseline", str(old)]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr == ""
    assert found.stdout.startswith("TOO FEW PROMPTS: 1 of 1 tests may turn out either way")


def test_other_settings_are_refused_and_missing_policies_are_no_pass(files):
    values = {"a": {"recall": base(8)}, "b": {"recall": base(8)}}
    new, old = summary(values), summary(values)
    new["run"], old["run"] = {"frames": 24, "seed": 1}, {"frames": 48, "seed": 1}
    with pytest.raises(ValueError, match=r"frames \(48 in the baseline, 24 in the run\)"):
        check(*files(new, old))
    old["run"]["frames"] = 24
    assert check(*files(new, old)).code == PASS
    del new["policies"]["b"]
    found = check(*files(new, old))
    assert found.code == THIN and found.absent == ("b",)
    assert "the run lacks b" in found.words[2]
    assert check(*files(new, old), policies=["a"]).code == PASS


def test_of_many_tests_one_that_is_worse_by_luck_is_not_yet_a_regression(files):
    """Beyond the margin at 95 %, not at the level that twenty tests together ask for."""
    losses = [0.01, 0.05, 0.02, 0.06, 0.03, 0.05, 0.02, 0.06]
    worse = {"recall": [value - loss for value, loss in zip(base(8), losses, strict=True)]}
    alone = check(
        *files(summary({"a": worse}), summary({"a": {"recall": base(8)}})), {"recall": 0.02}
    )
    assert alone.code == REGRESSION
    same = {f"p{i}": {"recall": base(8)} for i in range(19)}
    both = summary({"a": worse, **same}), summary({"a": {"recall": base(8)}, **same})
    assert check(*files(*both), {"recall": 0.02}).code == THIN


def test_other_weights_are_another_metric(files):
    new, old = summary({"a": {"recall": base(8)}}), summary({"a": {"recall": base(8)}})
    new["policies"]["a"]["metrics"]["recall"]["weights"] = "1234"
    with pytest.raises(ValueError, match="another way"):
        check(*files(new, old))


def test_what_is_lost_is_said_beside_what_is_worse(files):
    """The head must not say that values are worse where they are equal and some are gone."""
    paths = files(
        summary({"a": {"recall": [None, None, *base(8)[2:]]}}), summary({"a": {"recall": base(8)}})
    )
    head, worst, rests_on = check(*paths, {"recall": 0.02}).words
    assert head == (
        "REGRESSION: in 1 of 1 tests the run is worse than the baseline by more than the margin or "
        "has lost a value."
    )
    assert worst == "Worst: a recall: equal, margin 0.02, and 2 prompts without a value now."
    assert rests_on == "Over 6 prompts, paired with the baseline's."
    paths = files(summary({"a": {"recall": [None] * 8}}), summary({"a": {"recall": base(8)}}))
    words = check(*paths, {"recall": 0.02}).words
    assert words[2] == "No prompt has a value in both the run and the baseline."


def test_one_test_is_not_called_tests(files):
    own = summary({"a": {"recall": base(6)}})
    assert "(1 test, 95 % confidence each)" in check(*files(own, own)).words[0]
