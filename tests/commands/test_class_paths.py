"""Classes of a user's own package, from the command line: what works, and what is refused."""

import dataclasses
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from lightning import Trainer

from lightning_kv.cli import main
from lightning_kv.runs.video import write_mp4
from lightning_kv.tasks.options import TrainerOptions, TrainingTrainerOptions

pytestmark = pytest.mark.usefixtures("no_page")
ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "data/panorama-quick")
SMALL = ["--prompts", "2", "--frames", "18", "--context_frames", "12", "--videos", "0"]
SMALL += ["--policies", "full,sliding-window@3f", "--metrics", "recall", "--data.shards", QUICK]

THINGS = """
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_kv.data.datamodule import PromptDataModule, RolloutItem
from lightning_kv.data.shards import PromptSample
from lightning_kv.metrics import VideoMetric
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.retain.window import Window


class LastPrompts(PromptDataModule):
    '''The prompts of a set from its end.'''

    def _prompts(self):
        return list(super()._prompts())[::-1]


class Sentences(LightningDataModule):
    '''Any text, without shards.'''

    def __init__(self, texts: list[str], first_seed: int = 7):
        super().__init__()
        self.texts, self.first_seed, self.finished = texts, first_seed, ()

    def items(self):
        for number, text in enumerate(self.texts):
            yield RolloutItem(PromptSample(f"own-{number}", text, self.first_seed + number))

    def first(self, prompts=None):
        return [item.key for item in self.items()][:prompts]

    def left(self):
        return sum(item.key not in self.finished for item in self.items())

    def describe(self):
        return {"texts": self.texts, "first_seed": self.first_seed}

    def about(self):
        return {"prompts": len(self.texts), "samples": 1, "data_seed": 0, "batch": 1}

    def test_dataloader(self):
        names = self.trainer.lightning_module.names
        left = [item for item in self.items() if item.key not in self.finished]
        return DataLoader(
            [[item._replace(policy=name)] for item in left for name in names], batch_size=None
        )


class Torn(Sentences, IterableDataset):
    '''Two workers read, and the second text cannot be read.'''

    def __iter__(self):
        yield [next(self.items())._replace(policy="full")]
        try:
            {}["film"]
        except KeyError as error:
            raise ValueError("A film ends early. Given a.mp4.\\nGive a: whole one.") from error

    def test_dataloader(self):
        return DataLoader(self, batch_size=None, num_workers=2)


class Pages(Logger):
    '''Writes the means as text.'''

    name, version = "pages", 0

    def __init__(self, save_dir: str, title: str = "means"):
        super().__init__()
        self.place, self.title = Path(save_dir), title

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        with (self.place / f"{self.title}.txt").open("a") as file:
            file.writelines(f"{name} {value}\\n" for name, value in metrics.items())


class Counts(Callback):
    '''Counts rollouts.'''

    def __init__(self, path: str):
        self.path, self.count = Path(path), 0

    def on_test_batch_end(self, trainer, *_):
        self.count += 1

    def on_test_end(self, trainer, module):
        self.path.write_text(f"{self.count} {type(trainer.strategy).__name__}")


class Nothing(Callback):
    pass


class OneDevice(SingleDeviceStrategy):
    def __init__(self, device: str = "cpu", **rest):
        super().__init__(torch.device(device), **rest)


class Mean(VideoMetric):
    '''Mean value of all pixels.'''

    name, unit, higher_is_better, recipe = "mean-pixel", "share", None, "mean of all pixels"
    plot_lower_bound = 0.0

    def __init__(self, scale: float = 1.0, **rest):
        super().__init__(**rest)
        self.scale = scale

    def frame_values(self, preds, target=None):
        return self.scale * preds.double().mean((1, 2, 3))


class NoCallback:
    pass


def function():
    pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of the user's, in the current folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "things.py").write_text(textwrap.dedent(THINGS))
    (tmp_path / "mine" / "broken.py").write_text("raise RuntimeError('half written')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def records(run):
    files = sorted((run / "records").iterdir())
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def test_a_data_module_a_logger_a_callback_and_a_strategy(mine):
    words = ["--data", "mine.things:LastPrompts", "--out", "run", "--trainer.limit_test_batches"]
    words += ["1.0", "--trainer.strategy", "mine.things:OneDevice", "--trainer.logger"]
    words += ["[csv,{class_path: mine.things.Pages, init_args: {title: told}}]"]
    words += ["--trainer.callbacks"]
    words += ["mine.things.Nothing,{class_path: mine.things.Counts, init_args: {path: count.txt}}"]
    main(["evaluate", *SMALL, *words])
    index = json.loads((ROOT / "data/panorama-quick/index.json").read_text())
    assert (mine / "count.txt").read_text() == "4 OneDevice"
    keys = {record["key"] for record in records(mine / "run")}
    assert len(keys) == 2 and index
    told = dict(line.split() for line in (mine / "run" / "told.txt").read_text().splitlines())
    found = json.loads((mine / "run" / "summary.json").read_text())["policies"]
    for name in ("full", "sliding-window@3f"):
        mean = found[name]["metrics"]["recall"]["mean"]
        (logged,) = (value for key, value in told.items() if name in key and "recall" in key)
        assert float(logged) == pytest.approx(mean)
    assert (mine / "run" / "log" / "metrics.csv").is_file()


def test_a_data_module_that_knows_no_shards(mine):
    config = mine / "own.yaml"
    config.write_text(
        "data:\n  class_path: mine.things.Sentences\n"
        "  init_args: {texts: [dusk fast n7 left, noon fast n7 left]}\n"
    )
    words = ["-c", str(config), "--data.init_args.first_seed", "40", "--out", "run", *SMALL[:-2]]
    main(["evaluate", *words])
    found = records(mine / "run")
    assert [r["key"] for r in found] == ["own-0", "own-0", "own-1", "own-1"]
    assert found[0]["prompt"] == "dusk fast n7 left"
    described = json.loads((mine / "run" / "run.json").read_text())["described"]
    assert described["data"]["first_seed"] == 40
    main(["evaluate", *words])  # nothing is left to do
    assert records(mine / "run") == found
    main(["evaluate", "-c", "run/config.yaml"])


@pytest.mark.slow
def test_a_data_module_that_a_settings_file_names_alone(mine):
    (mine / "own.yaml").write_text("data: mine.things:LastPrompts\n")
    main(["evaluate", "-c", "own.yaml", "--data.seed", "7", "--out", "run", *SMALL])
    usual = json.loads((ROOT / "data/panorama-quick/index.json").read_text())["samples"]
    found = json.loads((mine / "run" / "run.json").read_text())["described"]["data"]
    assert len(records(mine / "run")) == 4 and usual > 2 and found["seed"] == 7
    main(["evaluate", "-c", "run/config.yaml", "--out", "again"])
    first, again = (
        [(x["key"], x["metrics"]) for x in records(mine / at)] for at in ("run", "again")
    )
    assert first == again


def test_an_error_of_a_worker_is_said_without_its_traceback(mine, capsys):
    """One of somebody else's loader, too."""
    (mine / "own.yaml").write_text(
        "data: {class_path: mine.things.Torn, init_args: {texts: [dusk fast n7 left]}}"
    )
    words = ["-c", "own.yaml", "--out", "run", "--policies", "random@3f", *SMALL[2:-6]]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: A film ends early. Given a.mp4.\nGive a: whole one.\n"
    )


@pytest.mark.parametrize("how", ["mine.things:Mean", "{class_path: mine.things.Mean}"])
def test_a_metric_and_a_policy(mine, how):
    part = "{class_path: lightning_kv.policies.retain.window.Window, init_args: {budget: 3f}}"
    words = [*SMALL[:-6], "--data.shards", QUICK, "--prompts", "1", "--out", "run"]
    main(["evaluate", *words, "--policies", f"[full,{part}]", "--metrics", f"[recall,{how}]"])
    found = json.loads((mine / "run" / "summary.json").read_text())["policies"]
    name = "lightning_kv.policies.retain.window:Window@3f"
    assert list(found) == ["full", name]
    (own,) = (x for x in found[name]["metrics"] if "recall" not in x)
    assert 0 < found[name]["metrics"][own]["mean"] < 1


KINDS = [
    ("--data", "LightningDataModule", "NoCallback"),
    ("--trainer.callbacks", "Callback", "NoCallback"),
    ("--trainer.logger", "Logger", "NoCallback"),
    ("--trainer.strategy", "Strategy", "Nothing"),
    ("--trainer.profiler", "Profiler", "Nothing"),
]


@pytest.mark.parametrize(("option", "kind", "wrong"), KINDS, ids=lambda x: str(x))
def test_a_class_of_the_wrong_kind(mine, capsys, option, kind, wrong):
    cases = {
        f"mine.things:{wrong}": "is of the wrong kind: it is the class",
        "mine.things:function": "is of the wrong kind: it is 'function'",
        "mine.things:Absent": "is of the wrong kind: it is nothing",
        "mine.broken:Thing": "RuntimeError: half written",
        "mine.nowhere.Thing": "No module named 'mine.nowhere'",
        "mine/things.py:Thing": "is no address of a class",
    }
    for address, said in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *SMALL, "--out", "run", option, address])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"error: {option} ")
        assert said in error and f"derives from {kind}" in error and "Traceback" not in error
        assert not (mine / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.callbacks", "mine.things:Counts"], "Counts cannot be made: TypeError"),
        (
            ["--trainer.callbacks", "{class_path: mine.things.Counts, init_args: {pth: x}}"],
            "does not accept option 'pth'",
        ),
        (
            ["--data", "mine.things:Sentences", "--data.init_args", "{texts: 3}"],
            "Sentences cannot be made",
        ),
        (["--data.init_args", "{texts: [a]}"], "belong to no class. Give --data.class_path"),
        (["--trainer.logger", "[{class: x}]"], "which names no class. Write {class_path:"),
        (["--trainer.logger", "{class_path: csv"], "brackets that do not match"),
        (["--trainer.logger", "wandb"], "'wandb' is not known. Give csv, tensorboard, or a class"),
        (["--trainer.logger", "tensorbord"], "Did you mean 'tensorboard'?"),
        (["--trainer.profiler", "simpel"], "Did you mean 'simple'?"),
        (["--trainer.strategy", "dp3"], "Lightning's Trainer refuses"),
        (
            ["--trainer.profiler", "quick"],
            "'quick' is not known. Give simple, advanced, or",
        ),
        (["--trainer.limit_test_batches", "-3"], "Lightning's Trainer refuses"),
        (["--trainer.precision", "64-true"], "It takes '32-true' or '16-mixed' or 'bf16-mixed'"),
        (["--trainer.accelerator", "tpu"], "It takes 'auto' or 'cpu' or 'gpu'"),
        (["--trainer.max_epochs", "3"], "--trainer.max_epochs is refused: nothing is trained"),
        (["--trainer.enable-checkpointing"], "is refused: what a run writes is under --out"),
        (["--trainer.fast_dev_run", "true"], "--prompts 1 --frames 24 is as quick"),
        (["--trainer.num_node", "2"], "Did you mean 'trainer.num_nodes'?"),
        (["--metrics", "{class_path: mine.things.Nothing}"], "derives from Metric"),
        (["--policies", "{class_path: mine.things.Nothing}"], "is no part of a policy"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(mine, capsys, words, said):
    before = sorted(mine.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *SMALL, "--out", "run", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ")
    assert said in error and "Traceback" not in error
    after = [path for path in sorted(mine.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]


SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NAME": "x",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
LAUNCHED = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize(
    ("env", "words", "said"),
    [
        ({}, ["--devices", "5"], "--trainer.devices 5 contradicts the launcher, which says 2"),
        ({}, ["--trainer.num-nodes", "3"], "--trainer.num_nodes 3 contradicts the launcher"),
        (
            {"LT_ACCELERATOR": "cuda"},
            ["--accelerator", "cpu"],
            "--trainer.accelerator cpu contradicts the launcher, which says gpu",
        ),
        (
            {"LT_STRATEGY": "ddp"},
            ["--trainer.strategy", "fsdp"],
            "--trainer.strategy fsdp contradicts the launcher, which says ddp",
        ),
        ({"LT_PRECISION": "16-mixed"}, [], "`fabric run --precision 16-mixed` would be ignored"),
    ],
)
def test_arguments_that_contradict_the_launcher(
    tmp_path, monkeypatch, capsys, command, env, words, said
):
    for name, value in (LAUNCHED | env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    usual = SMALL if command == "evaluate" else ["a", "b"]
    with pytest.raises(SystemExit) as stop:
        main([command, *usual, "--out", "run", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and said in error
    assert "Leave" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize(
    ("env", "words", "said"),
    [
        ({}, ["--devices", "2"], "--trainer.devices 2 contradicts the launcher, which says 1"),
        ({}, ["--devices", "0,1"], "--trainer.devices 0,1 contradicts the launcher"),
        ({}, ["--num_nodes", "2"], "--trainer.num_nodes 2 contradicts the launcher, which says 1"),
        (SLURM, ["--devices", "3"], "--trainer.devices 3 contradicts srun, which says 2"),
        (SLURM, ["--num_nodes", "2"], "--trainer.num_nodes 2 contradicts srun, which says 1"),
        (None, ["--devices", "0"], "--trainer.devices 0 starts no process"),
        (None, ["--num_nodes", "0"], "--trainer.num_nodes 0 starts no process"),
        (None, ["--devices", "abc"], "`devices` selected with `CPUAccelerator` should be an int"),
        (None, ["--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp_spawn works in proc"),
        (None, ["--num_nodes", "2"], "--trainer.num_nodes 2 would wait for other machines"),
    ],
)
def test_numbers_of_processes_that_cannot_be(mine, monkeypatch, capsys, command, env, words, said):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    one = LAUNCHED | {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}
    for name, value in (one if env == {} else env or {}).items():
        monkeypatch.setenv(name, value)
    usual = SMALL
    if command == "compare":
        usual = ["one", "other"]
        for folder in usual:
            (mine / folder).mkdir()
            write_mp4(mine / folder / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    with pytest.raises(SystemExit) as stop:
        main([command, *usual, "--out", "run", "--accelerator", "cpu", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and "Traceback" not in error
    assert not (mine / "run").exists()


@pytest.mark.parametrize("options", [TrainerOptions, TrainingTrainerOptions])
def test_every_argument_of_the_trainer_is_taken_or_refused(options):
    theirs = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    ours = {field.name for field in dataclasses.fields(options)}
    assert ours | set(options.REFUSED) == theirs and not ours & set(options.REFUSED)


def test_what_evaluations_and_trainings_take_is_of_one_kind():
    one, other = map(get_type_hints, (TrainerOptions, TrainingTrainerOptions))
    both = (set(one) & set(other)) - {"REFUSED"}
    assert {"accelerator", "logger", "callbacks", "profiler"} <= both
    assert all(one[name] == other[name] for name in both)
