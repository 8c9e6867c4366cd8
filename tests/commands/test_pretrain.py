"""Trainings from the command line: loggers, callbacks, a device, and what is refused."""

import csv
import textwrap

import pytest
from safetensors.numpy import load_file

from lightning_kv.cli import main

STAGE = "[{steps: 2, chunks: 2, batch: 1, sizes: [4, 5], lr: 1e-3}]"
PANORAMA = ["pretrain", "--recipe.stages", STAGE, "--threads", "1", "--picture_every", "0"]
ENCODER = ["pretrain-encoder", "--recipe.steps", "6", "--recipe.worlds", "2"]
ENCODER += ["--recipe.warmup", "2", "--checkpoint_every", "2"]
COMMANDS = pytest.mark.parametrize("command", [PANORAMA, ENCODER], ids=["pretrain", "encoder"])

THINGS = """
from pathlib import Path

from lightning import Callback
from lightning.pytorch.loggers.logger import DummyLogger


class Counts(Callback):
    def __init__(self, path: Path, stop: int = -1):
        self.path, self.stop, self.steps = path, stop, 0

    def on_train_batch_end(self, trainer, *_):
        self.steps += 1
        trainer.should_stop = trainer.global_step == self.stop

    def on_train_end(self, trainer, pl_module):
        self.path.write_text(f"{self.steps} steps on {pl_module.device}")


class Kept(DummyLogger):
    def __init__(self, save_dir: str = "elsewhere"):
        super().__init__()
        self.file = Path(save_dir) / "kept.txt"

    def log_metrics(self, metrics, step=None):
        with self.file.open("a") as file:
            file.write(f"{step} {metrics['loss']:.6f}\\n")

    def after_save_checkpoint(self, checkpoint_callback):
        pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "trained_by.py").write_text(textwrap.dedent(THINGS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run):
    (file,) = run.glob("*.safetensors")
    return {name: tensor.tobytes() for name, tensor in load_file(file).items()}


def refused(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(PANORAMA, marks=pytest.mark.slow, id="pretrain"),
        pytest.param(ENCODER, id="enc"),
    ],
)
def test_loggers_callbacks_and_a_profiler_change_no_number(mine, command):
    main([*command, "--out", "plain"])
    words = ["--trainer.logger", "csv,trained_by:Kept", "--trainer.profiler", "simple"]
    words += ["--trainer.callbacks", "{class_path: trained_by.Counts, init_args: {path: count}}"]
    words += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    main([*command, "--out", "told", *words])
    assert weights(mine / "told") == weights(mine / "plain")
    steps = 2 if command is PANORAMA else 6
    assert (mine / "count").read_text() == f"{steps} steps on cpu"
    rows = [*csv.DictReader((mine / "told/log/version_0/metrics.csv").open())]
    kept = [line.split() for line in (mine / "told/kept.txt").read_text().splitlines()]
    assert [int(row["step"]) for row in rows] == [int(step) for step, _ in kept] == [*range(steps)]
    assert all(abs(float(row["loss"]) - float(kept[i][1])) < 1e-6 for i, row in enumerate(rows))
    assert "run_training_batch" in (mine / "told/fit-profile.txt").read_text()
    made = {path.name for path in mine.iterdir()} - {"__pycache__"}
    assert made == {"trained_by.py", "plain", "told", "count"}


def test_a_stopped_training_goes_on_and_keeps_what_was_logged(mine, capsys):
    every = ["--trainer.log_every_n_steps", "1"]
    main([*ENCODER, "--out", "whole", *every])
    stops = "{class_path: trained_by.Counts, init_args: {path: count, stop: 5}}"
    error = refused(capsys, [*ENCODER, "--out", "run", "--trainer.callbacks", stops, *every])
    assert "stopped before its end: at step 5 of 6. Give the same command again" in error
    assert not [*(mine / "run").glob("*.safetensors")]
    main([*ENCODER, "--out", "run", *every])
    assert weights(mine / "run") == weights(mine / "whole")
    logs = [mine / f"run/log/version_{part}/metrics.csv" for part in (0, 1)]
    first, second = ([int(row["step"]) for row in csv.DictReader(log.open())] for log in logs)
    assert first == [0, 1, 2, 3, 4] and second == [4, 5]


def test_tensorboard(mine):
    pytest.importorskip("tensorboard")
    main([*ENCODER, "--out", "run", "--trainer.logger", "tensorboard"])
    assert [*(mine / "run").glob("lightning_logs/version_0/events.out.tfevents.*")]
    assert not (mine / "run" / "log").exists()


def test_no_logger(mine):
    main([*ENCODER, "--out", "run", "--trainer.logger", "[]"])
    names = {path.name for path in (mine / "run").iterdir()}
    assert names == {"last.ckpt", "panorama_encoder.safetensors", "recipe.json"}


@COMMANDS
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.logger", "wandb"], "'wandb' is not known. Give csv, tensorboard, or a class"),
        (["--trainer.logger", "tensorbord"], "Did you mean 'tensorboard'?"),
        (["--trainer.profiler", "simpel"], "Did you mean 'simple'?"),
        (["--trainer.logger", "trained_by:Counts"], "of the wrong kind"),
        (["--trainer.callbacks", "trained_by:Kept"], "of the wrong kind"),
        (["--trainer.callbacks", "trained_by:Counts"], "Counts cannot be made: TypeError"),
        (
            ["--trainer.profiler", "quick"],
            "'quick' is not known. Give simple, advanced, or",
        ),
        (["--trainer.accelerator", "tpu"], "It takes 'auto' or 'cpu' or 'gpu'"),
        (["--trainer.devices", "2"], "--trainer.devices is refused: a recipe gives the same"),
        (["--devices", "2"], "--devices is refused: a recipe gives the same"),
        (["--trainer.max_steps", "2"], "is refused: what the numbers depend on is in the recipe"),
        (["--trainer.precision", "bf16-mixed"], "is refused: what the numbers depend on"),
        (["--trainer.calbacks", "x"], "Did you mean 'trainer.callbacks'?"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(mine, capsys, command, words, said):
    assert said in refused(capsys, [*command, "--out", "run", *words])
    assert not (mine / "run").exists()


@COMMANDS
@pytest.mark.parametrize(
    ("env", "words", "said"),
    [
        ({"WORLD_SIZE": "2"}, [], "runs on one device: the launcher starts 2 processes"),
        (
            {"LT_ACCELERATOR": "cuda"},
            ["--accelerator", "cpu"],
            "--trainer.accelerator cpu contradicts the launcher, which says gpu",
        ),
    ],
)
def test_what_contradicts_the_launcher(mine, capsys, monkeypatch, command, env, words, said):
    one = {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}
    for name, value in (one | env).items():
        monkeypatch.setenv(name, value)
    assert said in refused(capsys, [*command, "--out", "run", *words])
    assert not (mine / "run").exists()
