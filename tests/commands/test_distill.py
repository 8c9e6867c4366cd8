"""`lightning-kv distill`: what is typed, what is refused, and a dry run without weights."""

import re
from pathlib import Path

import pytest

from lightning_kv.cli import main, parse
from lightning_kv.commands.distill import plan_of, work_of
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.distillation.clips import Collecting
from lightning_kv.distillation.labels import Teacher
from lightning_kv.policies.scorer.features import FEATURES, GROUPS
from lightning_kv.tasks.distill import Plan
from lightning_kv.tasks.options import DistillRecipe

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/distill.yaml")


def options(*words):
    return parse("distill", words)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["distill", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


def test_what_is_typed_is_what_is_distilled():
    usual = Collecting(Teacher("out-future", None, 0.8), budgets=(*range(4, 13), 15, 18))
    assert plan_of(options(), 72, 3) == Plan(collecting=usual)
    assert plan_of(options(), 21, 3).collecting.budgets == (*range(4, 13), 15)
    words = ["--teacher.target", "mass-future", "--teacher.horizon", "4", "--labels", "shadow"]
    words += ["--budgets", "9f,6", "--student", "set", "--prior", "recency", "--rounds", "1"]
    words += ["--recipe.lr", "1e-3", "--recipe.steps", "9", "--recipe.soft", "2,0.5"]
    words += ["--without", "mass,neighbour", "--validate", "3", "--seed", "7"]
    names = tuple(x for x in FEATURES if x not in GROUPS["mass"] and x != "neighbour")
    assert plan_of(options(*words), 72, 3) == Plan(
        "set",
        "recency",
        names,
        True,
        Collecting(Teacher("mass-future", 4, 0.8), "shadow", (6, 9)),
        1,
        DistillRecipe(steps=9, lr=1e-3, soft=(2.0, 0.5)),
        3,
        True,
        7,
    )


def test_the_configuration_learns_from_other_worlds_than_an_evaluation():
    told = options("-c", CONFIG)
    evaluation = parse("evaluate", ["-c", str(ROOT / "configs/evaluate.yaml")])
    mine, theirs = (
        {
            sample.key
            for sample in PromptDataModule(
                ROOT / own.data.shards, own.prompts, seed=own.data.seed
            ).prompt_samples()
        }
        for own in (told, evaluation)
    )
    assert len(mine) == 96 and not mine & theirs and told.data.seed != evaluation.data.seed
    assert (told.frames, told.context_frames) == (evaluation.frames, evaluation.context_frames)
    assert plan_of(told, 72, 3).validate == 8 and options().data.seed == told.data.seed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "9"], "Too few prompts: 9 are asked for, and 8 of them are held out"),
        (["--teacher.target", "mass"], "unknown. Use one of: mass-now, mass-future"),
        (["--teacher.gamma", "1"], "--teacher.gamma is not known. "),
        (["--teacher.discount", "2"], "discount=2, out of range"),
        (["--recipe.step", "3"], "--recipe.step is not known. Did you mean 'steps'?"),
        (["--recipe.steps", "0"], "steps is 0. Give a whole number 1 or more"),
        (["--recipe.soft", "1"], "--recipe.soft 1 does not fit. Give two numbers"),
        (["--recipe.soft", "hard,0.1"], "--recipe.soft 'hard,0.1' does not fit. Give two numbers"),
        (["--recipe.lr", "fast"], "lr is 'fast'"),
        (["--teacher.horizon", "six"], "horizon=six, out of range. Use a horizon"),
        (["--frames", "6", "--context_frames", "3"], "Clips of 6 frames are too short to teach"),
        (["--without", "masses"], "No feature or group of features 'masses'. Did you mean 'mass'"),
        (["--without", "total-mass"], "looks at total-mass, which is left out"),
        (["--student", "deep"], "No student 'deep'"),
        (["--prior", "h20"], "No prior 'h20'. Did you mean 'h2o'?"),
        (["--labels", "mine"], "Labels 'mine' are unknown"),
        (["--rounds", "-1"], "-1 rounds cannot be run"),
        (["--budgets", "few"], "--budgets few is no number of frames"),
        (["--budgets", "3f"], "A budget of 3 frames teaches nothing"),
        (["--budgets", "70f"], "Give budgets from 4 to 68, or longer clips"),
        (["--out", "scorer.json"], "Give scorer.safetensors"),
        (["--threads", "0"], "leaves nobody to work"),
        (["--trainer.limit_test_batches", "2"], "would leave clips out that its file says"),
        (["--max_steps", "3"], "--max_steps is refused: what the numbers depend on is in the"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    capsys, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    own = ["--data.shards", str(ROOT / "data/panorama-quick"), "--trainer.accelerator", "cpu"]
    assert said in refused(capsys, *own, *words)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_no_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "wan-1.3b", "--frames", "126", "--prompts", "112", "--validate", "16"]
    main(["distill", *words, "--devices", "8", "--dry_run"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Clips: 352 (112 prompts, 16 of them held out; 3 rounds" in text and "8 proc" in text
    assert re.search(r"rollouts \S+ EFLOP; fits \S+ TFLOP", text)
    assert re.search(r"Disk: \S+ MiB a clip, \S+ GiB in all", text)
    assert re.search(r"about \S+ hours with rollouts at 250 TFLOP a second .*\(assumed\)", text)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_configuration_is_within_what_is_allowed():
    work, known = work_of(options("-c", CONFIG, "--trainer.devices", "2"))
    assert known == "measured" and sum(work.hours.values()) * 60 < 20
    more, _ = work_of(options("-c", CONFIG, "--labels", "shadow", "--trainer.devices", "2"))
    assert more.flops["labels"] > 0 == work.flops["labels"]


def test_decisions_and_bytes_are_counted_as_they_are_made(panorama):
    """Against a record: lists of every commit that drops frames, but the last, of every head."""
    from lightning_kv.distillation.clips import ClipCollector
    from lightning_kv.policies.scorer.artifact import Scorer
    from lightning_kv.tasks.distillation.records import TENSORS

    words = ["--frames", "18", "--context_frames", "0", "--budgets", "5f"]
    work, _ = work_of(options(*words))
    own = plan_of(options(*words), 18, 3).collecting
    scorer = Scorer.fresh("linear", panorama.network.geometry())
    lists = ClipCollector(panorama, scorer, own, 18).of_prompt("k", "k", "dusk fast n10 left").lists
    assert len(lists) == work.lists
    held = [getattr(lists, name) for name in TENSORS]
    size = sum(own.numel() * own.element_size() for own in held)
    assert size == pytest.approx(work.record, rel=0.15)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "8"], "Too few prompts"),
        (["--model", "wan-1.3b", "--prompts", "null"], "how many prompts"),
        (["--model", "wan"], "No model 'wan'"),
        (["--frames", "6", "--context_frames", "3"], "too short to teach anything"),
    ],
)
def test_a_dry_run_says_what_a_run_would(capsys, words, said):
    assert re.search(said, refused(capsys, *words, "--dry_run"))
