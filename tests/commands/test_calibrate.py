"""`lightning-kv calibrate`: what is typed, what is refused, and a dry run without weights."""

import json
import re
from pathlib import Path

import pytest

from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.cli import main, parse
from lightning_kv.commands.calibrate import as_evaluation, config_of, measuring_of, work_of
from lightning_kv.models.sizes import PRESETS

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/calibrate.yaml")


def options(*words):
    return parse("calibrate", words)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


def test_what_is_typed_is_what_is_measured():
    found = measuring_of(options(), world=True)
    assert found == SiteSettings(reach=24, exact=(0, 3, 6, 12))
    assert measuring_of(options(), world=False) == SiteSettings(reach=18, exact=(0, 2, 4, 9))
    words = ["--reach", "9f", "--sink", "3", "--scorers", "focused,recency", "--chunks", "2"]
    words += ["--measuring.steps", "0,1", "--measuring.rows", "7", "--measuring.seed", "5"]
    found = measuring_of(options(*words, "--exact", "9,3", "--probes", "1"), world=True)
    scorers = ("focused", "recency")
    told = {"sink": 3, "chunks": 2, "steps": (0, 1), "rows": 7, "seed": 5, "exact": (3, 9)}
    assert found == SiteSettings(reach=9, scorers=scorers, probes=1, **told)
    assert measuring_of(options("--sink", "3"), world=True).exact == (3, 6, 12)
    every = measuring_of(options("--exact", "all", "--sink", "3"), world=True)
    assert every.exact == every.budgets == tuple(range(3, 25))
    assert measuring_of(options("--measuring.steps", "0"), world=True).steps == (0,)


def test_the_configuration_measures_other_worlds_than_an_evaluation(capsys):
    told = options("-c", CONFIG)
    evaluation = parse("evaluate", ["-c", str(ROOT / "configs/evaluate.yaml")])
    assert told.data.shards == evaluation.data.shards and told.data.seed != evaluation.data.seed
    assert (told.frames, told.context_frames) == (evaluation.frames, evaluation.context_frames)
    assert options().data.seed == told.data.seed
    assert as_evaluation(told).decode is False and not as_evaluation(told).metrics


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reach", "a lot"], "--reach a lot is no number of frames. Give one, such as 24f."),
        (["--exact", "0,x"], "'x' is no whole number"),
        (["--measuring.row", "3"], "--measuring.row is not known. Did you mean 'rows'?"),
        (["--measuring.probes", "3"], "all else is an option of its own"),
        (["--chunks", "0"], "Nothing can be calibrated with chunks=0"),
        (["--prompts", "1"], "Too few prompts: 1 are asked for"),
        (["--frames", "24"], "24 latent frames has 0 chunks with 24 frames of history"),
        (["--scorers", "mas"], "Did you mean 'mass'"),
        (["--mean", "24"], "A mean of 24 frames is no budget of these curves"),
        (["--out", "heads.json"], "Give heads.safetensors"),
        (["--threads", "0"], "leaves nobody to work"),
        (["--reference", "nowhere@24f"], "nowhere"),
        (["--rate", "3"], "No setting 'rate'"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    capsys, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    own = ["--data.shards", str(ROOT / "data/panorama-quick"), "--trainer.accelerator", "cpu"]
    assert said in refused(capsys, *own, *words)
    assert not list(tmp_path.iterdir())


def test_videos_and_prompts_exclude_each_other(capsys, tmp_path):
    shards = ["--data.shards", str(ROOT / "data/panorama-quick")]
    assert "Give one of them" in refused(capsys, *shards, "--videos", str(tmp_path))


def test_a_dry_run_needs_no_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "wan-1.3b", "--frames", "126", "--prompts", "32", "--devices", "8"]
    main(["calibrate", *words, "--dry_run"])
    text = " ".join(capsys.readouterr().out.split())
    assert "32 prompts" in text and "8 processes: 4 each" in text
    assert re.search(
        r"rollouts 258 PFLOP; judging heads \d+ PFLOP; measuring exactly \S+ EFLOP", text
    )
    assert re.search(r"about \d+ minutes at 250 TFLOP a second and process \(assumed\)", text)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_configuration_is_minutes_at_most():
    work, known = work_of(options("-c", CONFIG, "--trainer.devices", "2"))
    assert work.prompts == 32 and known == "measured" and work.hours * 60 < 5
    assert work.settings.reach == 24 and work.context == 15
    counted, _ = work_of(options("-c", CONFIG, "--prompts", "null"))
    assert (
        counted.prompts
        == json.loads((ROOT / "data/panorama-fast13/index.json").read_text())["samples"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "wan-1.3b"], "21 latent frames has 1 chunk with 18 frames of history"),
        (["--model", "wan-1.3b", "--frames", "126", "--prompts", "null"], "how many prompts"),
        (["--prompts", "1"], "Too few prompts: 1"),
        (["--model", "wan"], "No model 'wan'"),
    ],
)
def test_a_dry_run_says_what_a_run_would(capsys, words, said):
    assert said in refused(capsys, *words, "--dry_run")


def test_sizes_are_known_by_any_name_of_a_model():
    assert config_of("panorama") == (PRESETS["panorama"], True)
    assert config_of("wan-1.3b") == (PRESETS["wan-1.3b"], False)
    config, world = config_of("self-forcing")
    assert config.dim == 1536 and not world
