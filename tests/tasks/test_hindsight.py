"""Policies that know what is to come, in an evaluation: their tables, and what is said of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
from test_recommend import Policy, made

from lightning_kv import preset, rollout
from lightning_kv.cache import outputs
from lightning_kv.cli import main
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.metrics import metric_by_name
from lightning_kv.policies.registry import load_policy
from lightning_kv.runs.analysis import analyse
from lightning_kv.runs.recommend import recommend
from lightning_kv.runs.summary import hindsight
from lightning_kv.tasks.measuring.adapter import Clip, measure
from lightning_kv.tasks.rollouts.context import panorama_start
from lightning_kv.tasks.rollouts.policies import chosen_policies

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "data/panorama-quick"
BOUNDS = ["oracle@6f", "oracle-mass@6f", "oracle-reads@6f"]
pytestmark = pytest.mark.usefixtures("no_page")
POLICIES = ["full", *BOUNDS, "h2o@6f"]
FRAMES, CONTEXT = 15, 6
WORDS = [
    *("evaluate", "--data.shards", str(SHARDS), "--prompts", "2", "--frames", str(FRAMES)),
    *("--context_frames", str(CONTEXT), "--policies", f"[{','.join(POLICIES)}]"),
    *("--videos", "0", "--threads", "1", "--trainer.accelerator", "cpu"),
    *("--metrics", "[latent_mse,recall]"),
]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    main([*WORDS, "--trainer.devices", "1", "--out", str(out)])
    return out


def summary(out):
    return json.loads((out / "summary.json").read_text())


def values(out):
    """Metrics and counted costs of every clip."""
    lines = [line for p in (out / "records").iterdir() for line in p.read_text().splitlines()]
    return {
        (r["policy"], r["key"]): [
            *(r["metrics"][name] for name in ("latent_mse", "recall")),
            *(r["cost"][name] for name in ("kv_rows_read", "kv_rows_scored")),
        ]
        for r in map(json.loads, lines)
    }


def test_every_clip_is_that_of_a_rollout_with_its_own_tables(single, panorama):
    found = values(single)
    data = PromptDataModule(SHARDS, 2)
    metrics = metric_by_name(["recall"])
    samples = data.prompt_samples()
    assert len(samples) == 2
    for sample in samples:
        start = panorama_start(sample, panorama.codec, FRAMES, CONTEXT)
        about = {"keys": [sample.key], "context": start.context.unsqueeze(0)}
        full = rollout(
            panorama, preset("full"), sample.prompt, FRAMES, record=["mass", "outputs"], **about
        )
        for name in POLICIES:
            policy = preset(name)
            tables = {need: full.tables[need] for need in policy.needs}
            out = rollout(panorama, policy, sample.prompt, FRAMES, tables=tables, **about)
            clip = Clip(out.latents[0], out.frames[0], context=CONTEXT, scene=start.scene)
            mse, recall, read, scored = found[name, sample.key]
            difference = (out.latents - full.latents)[:, CONTEXT:].double().square().mean()
            assert mse == pytest.approx(float(difference), rel=1e-4, abs=1e-9), name
            assert recall == pytest.approx(measure(metrics, clip).values["recall"]), name
            assert (read, scored) == (out.costs[0].rows_read, out.costs[0].rows_scored)
    losses = {name: [found[name, sample.key][0] for sample in samples] for name in POLICIES}
    assert losses["full"] == [0, 0]
    assert all(
        0 < bound < 0.5 * real
        for bound, real in zip(losses["oracle@6f"], losses["h2o@6f"], strict=True)
    )


@pytest.mark.parametrize(
    "how", [["--batch", "2"], ["--trainer.devices", "2"]], ids=["batch", "ranks"]
)
@pytest.mark.thinned(2)
def test_batches_and_ranks_use_the_tables_of_their_samples(single, tmp_path, how):
    words = [
        *WORDS,
        "--policies",
        "[oracle@6f,oracle-mass@6f]",
        *how,
        "--out",
        str(tmp_path / "run"),
    ]
    if how[0] == "--batch":
        main([*words, "--trainer.devices", "1"])
    else:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
        command = [sys.executable, "-m", "lightning_kv", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "run" / "records").iterdir())) == 2
    ours, theirs = values(tmp_path / "run"), values(single)
    assert {name for name, _ in ours} == {"full", "oracle@6f", "oracle-mass@6f"} and len(ours) == 6
    for clip, line in ours.items():
        since = int(clip[0] == "full")  # which is compared with nothing here
        assert line[since:] == pytest.approx(theirs[clip][since:], rel=1e-3, abs=1e-7), clip


# -- what is said of them ----------------------------------------------------------------------


def test_a_run_says_which_policies_are_bounds(single):
    found = summary(single)
    assert hindsight(found) == BOUNDS
    fronts = {name for axes in found["pareto"].values() for own in axes.values() for name in own}
    assert fronts == {"full", "h2o@6f"}


def test_pages_mark_them(single, capsys):
    text = (single / "report.md").read_text()
    assert all(f"| {name} (bound) |" in text for name in BOUNDS)
    assert "| h2o@6f |" in text
    assert "nothing to run: oracle@6f, oracle-mass@6f, oracle-reads@6f" in text
    main(["inspect", str(single)])
    shown = capsys.readouterr().out
    assert "oracle@6f (bound)" in shown and "h2o@6f (bound)" not in shown


def bounded(policies, bounds, prompts=16, **options):
    found, records = made(policies, prompts, **options)
    found["run"]["hindsight"] = list(bounds)
    return found, records


def test_the_cheapest_that_keeps_its_quality_is_not_recommended_if_it_knows_the_future():
    policies = {
        "oracle@6f": Policy(mib=0.5, reads=0.1, seconds=0.01),
        "honest": Policy(mib=1.0, reads=0.4),
        "forgets": Policy(mib=0.5, reads=0.1, recall=0.5),
    }
    assert recommend(*made(policies)).policy == "oracle@6f", "where nobody says what it is"
    found = recommend(*bounded(policies, ["oracle@6f"]))
    assert found.policy == "honest" and found.bounds == ("oracle@6f",)
    assert [one.policy for one in found.candidates] == ["honest", "forgets"]
    assert (found.runner_up, found.fewest_reads, found.fastest) == (None, None, None)
    assert found.words[-1] == "Bounds that know what is to come, nothing to run: oracle@6f."
    assert not any("oracle" in line for line in found.words[:-1])


def test_where_nothing_else_keeps_its_quality_nothing_is_recommended():
    policies = {"oracle@6f": Policy(mib=0.5), "forgets": Policy(mib=0.5, recall=0.5)}
    found = recommend(*bounded(policies, ["oracle@6f"]), memory=2**20)
    assert (found.policy, found.closest, found.beyond) == (None, "forgets", None)


def test_bounds_do_not_count_among_the_tests_that_are_corrected_for():
    recall = [1.0 - 0.001 * (i % 3) for i in range(16)]
    honest = {"honest": Policy(mib=1.0, recall=recall)}
    many = {f"oracle@{i}f": Policy(mib=0.5, recall=0.2) for i in range(1, 9)}
    alone = recommend(*made(honest)).of("honest").confidence
    assert recommend(*bounded(honest | many, many)).of("honest").confidence == alone
    assert recommend(*made(honest | many)).of("honest").confidence < alone


def test_a_run_of_nothing_but_bounds_is_said_to_be_one():
    run = bounded({"oracle@6f": Policy(mib=0.5), "oracle@9f": Policy()}, ["oracle@6f", "oracle@9f"])
    text = (
        r"nothing to recommend: .*'full' the run has only oracle@6f, oracle@9f, which.*Evaluate o"
    )
    with pytest.raises(ValueError, match=text):
        recommend(*run)


def test_a_run_in_which_nothing_but_bounds_is_measured_yet_says_so():
    found, records = bounded({"oracle@6f": Policy(mib=0.5), "honest": Policy()}, ["oracle@6f"])
    early = [record for record in records if record["policy"] != "honest"]
    with pytest.raises(
        ValueError, match=r"nothing to compare yet: full is all .* Give the run time"
    ):
        recommend(found, early)


def test_bounds_stand_on_no_front():
    policies = {
        "oracle@6f": Policy(mib=0.5, reads=0.1),
        "honest": Policy(mib=1.0, reads=0.5, recall=0.99),
    }
    found, records = bounded(policies, ["oracle@6f"])
    fronts = analyse(found, records)["pareto"]["recall"]
    for axis in ("kv_bytes_peak", "kv_read_fraction"):
        assert set(fronts[axis]) == {"full", "honest"}
        assert fronts[axis]["honest"]["front"]
    other, records = made(policies)
    dominated = analyse(other, records)["pareto"]["recall"]["kv_bytes_peak"]
    assert not dominated["honest"]["front"]


def test_a_run_from_before_there_were_bounds_has_none():
    found, _ = made({"honest": Policy()})
    assert "hindsight" not in found["run"] and list(hindsight(found)) == []


# -- what is refused ---------------------------------------------------------------------------


def refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", [*BOUNDS, "{name: mine, retain: {part: oracle, budget: 6f}}"])
def test_one_video_alone_has_no_reference(name, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    said = refused(["generate", "noon fast n7 left", "-o", str(out), "--policy", name], capsys)
    assert "of a reference rollout of the same clip" in said and "one clip only" in said
    assert "Use `lightning-kv evaluate`" in said
    assert not out.exists()


def test_a_reference_that_needs_one_itself_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    words = [*WORDS, "--reference", "oracle@6f", "--out", str(out)]
    said = refused(words, capsys)
    assert "'oracle@6f' needs outputs of a reference rollout" in said
    assert "Give --reference full" in said
    assert not out.exists()
    with pytest.raises(ValueError, match="needs mass of a reference rollout"):
        chosen_policies(["full"], "oracle-mass@6f")


def test_policies_that_want_one_table_in_two_ways_are_refused(tmp_path, capsys):
    out = tmp_path / "run"
    one = "{name: a, retain: {part: oracle, queries: 4, budget: 6f}}"
    other = "{name: b, select: {part: oracle-reads, queries: 8, budget: 6f}}"
    words = [*WORDS, "--policies", f"[{one},{other}]", "--out", str(out)]
    said = refused(words, capsys)
    assert "records 'outputs' once: 'a' wants it with {'queries': 4}" in said
    assert "Give both the same settings, or evaluate them in two runs" in said
    assert not out.exists()


def test_a_table_above_its_limit_is_refused_before_anything_is_written(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    initial = outputs.OutputRecorder.__init__

    def small(self, queries=4, limit=1000):
        initial(self, queries, limit)

    monkeypatch.setattr(outputs.OutputRecorder, "__init__", small)
    said = refused([*WORDS, "--out", str(out)], capsys)
    assert "'outputs' takes" in said and "its limit is 1,000. Record less" in said
    assert not out.exists()


def test_a_policy_file_with_an_oracle_is_a_bound_whatever_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nselect: {part: oracle-reads, objective: mass, budget: 6f}\n")
    assert load_policy(str(path)).needs == {"mass": {}}


@pytest.mark.parametrize("reference", ["sliding-window@6f", "top-attention@6f"])
def test_a_reference_that_loses_something_itself_bounds_nothing(reference):
    with pytest.raises(ValueError, match=r"itself drops frames or does not read .* full"):
        chosen_policies(["oracle-mass@6f", "h2o@6f"], reference)
