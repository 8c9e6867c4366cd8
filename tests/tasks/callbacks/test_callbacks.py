"""Callbacks and modules under somebody's own Trainer: whose directory, which data, what is said."""

import json
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import av
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_kv.cli import main
from lightning_kv.data.datamodule import PromptDataModule, VideoPairDataModule
from lightning_kv.data.pairs import Alignment
from lightning_kv.metrics import VideoMetric
from lightning_kv.metrics.backbones.panorama_encoder import PanoramaEncoder
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.tasks.callbacks import (
    ComparisonVideos,
    FrameProgressBar,
    PairVideos,
    RecordWriter,
    RolloutProgressBar,
    TraceWriter,
)
from lightning_kv.tasks.compare import CompareModule, paired_videos
from lightning_kv.tasks.evaluate import EvaluateModule

SHARDS = Path(__file__).parents[3] / "data/panorama-quick"
FVD = "fvd/panorama-encoder"
SMALL = {"frames": 12, "context_frames": 6}
POLICY = "sliding-window@6f"


def trainer(callbacks=(), **more):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return L.Trainer(callbacks=list(callbacks), **(quiet | more))


def module(metrics=("recall",), policies=(POLICY,), **settings):
    return EvaluateModule("panorama", list(policies), metrics=list(metrics), **(SMALL | settings))


def measured(own, callbacks=(), prompts=1, **data):
    given = PromptDataModule(SHARDS, prompts, **data)
    return trainer(callbacks).test(own, datamodule=given, verbose=False)[0]


def pairs(root, *candidates, length="equal"):
    """Videos in folders of one place, and a module that compares them."""
    folders = tuple(root / name for name in ("full", *candidates))
    videos, alignment = paired_videos(folders), Alignment(length)
    own = CompareModule(videos.names, videos.reference, ["psnr"], alignment=alignment)
    return own, VideoPairDataModule(videos, alignment)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two prompts, with their traces."""
    out = tmp_path_factory.mktemp("own") / "run"
    measured(module(["recall", "latent_mse"]), [RecordWriter(out, report=False)], 2)
    return out


@pytest.mark.parametrize("kind", [ComparisonVideos, TraceWriter])
def test_pictures_alone_do_not_go_into_another_run(run, tmp_path, kind):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match=r"holds another run.* \(there 0, asked 5\).* Give an"):
        measured(module(["recall", "latent_mse"], seed=5), [kind(out)], 2)
    assert sorted(out.rglob("*")) == before
    measured(module(["recall", "latent_mse"]), [kind(out)], 2)
    assert len(sorted(out.rglob("*"))) > len(before), "its own run gets them"


def test_pictures_of_pairs_alone_do_not_go_into_another_run(folders, run):
    own, data = pairs(folders, "near")
    with pytest.raises(ValueError, match="holds another run"):
        trainer([PairVideos(run)]).test(own, datamodule=data, verbose=False)


def test_pictures_do_not_go_into_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is no run directory"):
        measured(module(), [ComparisonVideos(tmp_path / "run")])


def test_callbacks_of_a_run_rest_while_somebody_trains(tmp_path):
    beside = [kind(tmp_path / "run") for kind in (RecordWriter, ComparisonVideos, PairVideos)]
    trainer(beside, max_steps=1, limit_val_batches=0).fit(BoringModel())
    assert not (tmp_path / "run").exists()


def said(found):
    return [str(each.message) for each in found if "The metric" in str(each.message)]


class Choosy(VideoMetric):
    """Somebody's metric that judges no clip of a policy."""

    name, higher_is_better = "choosy", True

    def frame_values(self, preds, target=None):
        raise ValueError("It is too dark.")


class Blind(VideoMetric):
    """Somebody's metric without a value for any frame."""

    name, higher_is_better, undefined = "blind", True, "nobody looked"

    def frame_values(self, preds, target=None):
        return torch.full((len(preds),), torch.nan, dtype=torch.float64)


def test_metrics_without_any_value_are_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    writer, told = RecordWriter(tmp_path / "run", report=False), []
    for start in ("new", "all is there", "features are lost"):
        own = module(["psnr", "lpips", FVD, Choosy(), Blind()])
        with warnings.catch_warnings(record=True) as found, monkeypatch.context() as patch:
            warnings.simplefilter("always")
            if start == "all is there":
                patch.setattr("lightning_kv.tasks.evaluate.rollout", None)
            if start == "features are lost":
                next((tmp_path / "run/features/policies" / POLICY).iterdir()).unlink()
            logged = measured(own, [writer], 2)
        assert set(logged) == {f"{POLICY}/psnr"}
        told.append(said(found))
    assert told[0] == told[1] == told[2] and len(told[0]) == 4
    missing, *rest = told[0]
    assert missing.startswith("The metric 'lpips/alex' is unavailable and will have no value. The ")
    none = f"has no value for full, {POLICY}."
    assert rest == [
        f"The metric '{FVD}' {none} 4 clips: shorter than its window of 8 frames.",
        f"The metric 'choosy' {none} 4 clips: It is too dark.",
        f"The metric 'blind' {none} nobody looked.",
    ]


def test_nothing_is_said_where_all_have_values_or_what_they_lack_is_plain():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        measured(module(["recall", "psnr", "latent_mse"]))
        short = trainer(limit_test_batches=1)  # the reference alone
        short.test(module(), datamodule=PromptDataModule(SHARDS, 1), verbose=False)
    assert said(found) == []
    with pytest.warns(UserWarning, match="no value for full, .* has 1 generated clips"):
        measured(module([FVD], frames=24))


def test_clips_that_failed_are_a_reason(monkeypatch):
    def broken(out, reference, index):
        return None if out is reference else "it broke"

    monkeypatch.setattr("lightning_kv.tasks.evaluate.broken", broken)
    with pytest.warns(UserWarning, match=rf"'recall' has no value for {POLICY}. 2 clips: it bro"):
        measured(module(), prompts=2)


def test_the_command_line_says_it_in_its_table_alone(tmp_path, monkeypatch, capsys, folders):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = ["evaluate", "--data.shards", str(SHARDS), "--prompts", "1", "--frames", "12"]
    words += ["--context_frames", "6", "--policies", f"[{POLICY}]", "--videos", "0"]
    words += ["--metrics", f"[recall,lpips,{FVD}]", "--trainer.accelerator", "cpu"]
    words += ["--trainer.devices", "1", "--out", str(tmp_path / "run")]
    pair = ["compare", str(folders / "full"), str(folders / "near"), "--metrics", f"[psnr,{FVD}]"]
    pair += ["--accelerator", "cpu", "--out", str(tmp_path / "pair"), "--videos", "0"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        main(words)
        assert "unavailable" in capsys.readouterr().out
        main(pair)
    assert said(found) == []


def loader(items):
    return torch.utils.data.DataLoader(items, batch_size=None)


def test_items_that_cannot_be_measured_are_refused():
    own, call = module(), r"Call trainer\.test\(module, datamodule=PromptDataModule\("
    items = list(PromptDataModule(SHARDS, 1)._items())
    for given, why in (
        (torch.zeros(2, 3), "not a list of RolloutItem, but Tensor"),
        (items, "not a list of RolloutItem, but RolloutItem"),
        ([["a text"]], "not a list of RolloutItem, but str"),
        ([[]], f"items of one of the policies full, {POLICY} are due, not of none"),
        ([items], f"policies full, {POLICY} are due, not of ''"),
        ([[items[0]._replace(policy="ful")]], f"full, {POLICY} are due, not of 'ful'"),
    ):
        with pytest.raises(ValueError, match=f"EvaluateModule cannot measure .*{why}. {call}"):
            trainer().test(own, dataloaders=loader(given), verbose=False)
    good = [[items[0]._replace(policy=name)] for name in own.names]
    assert trainer().test(own, dataloaders=loader(good), verbose=False)[0] == measured(own)


def test_data_modules_of_another_kind_are_refused(folders, tmp_path):
    comparing, of_pairs = pairs(folders, "near")
    prompts, out = PromptDataModule(SHARDS, 1), tmp_path / "run"
    to_prompts = r"Call trainer\.test\(module, datamodule=PromptDataModule\("
    to_pairs = to_prompts.replace("Prompt", "VideoPair")
    with pytest.raises(ValueError, match=f"but Piece. {to_prompts}"):
        trainer().test(module(), datamodule=of_pairs, verbose=False)
    with pytest.raises(ValueError, match=f"not a Piece, but list. {to_pairs}"):
        trainer().test(comparing, datamodule=prompts, verbose=False)
    for kind in (RecordWriter, ComparisonVideos, TraceWriter):
        with pytest.raises(ValueError, match=f"{kind.__name__} asks .*VideoPair.* {to_prompts}"):
            trainer([kind(out)]).test(module(), datamodule=of_pairs, verbose=False)
        with pytest.raises(ValueError, match=f"asks it for desc.* a BoringDataM.* {to_prompts}"):
            trainer([kind(out)]).test(module(), datamodule=BoringDataModule(), verbose=False)
    for kind in (RecordWriter, PairVideos):
        with pytest.raises(ValueError, match=f"fit CompareModule: {kind.__name__} .* {to_pairs}"):
            trainer([kind(out)]).test(comparing, datamodule=prompts, verbose=False)
    with pytest.raises(ValueError, match=f"RolloutProgressBar asks it for left.*{to_prompts}"):
        trainer([RolloutProgressBar()], enable_progress_bar=True).test(
            module(), datamodule=of_pairs, verbose=False
        )
    with pytest.raises(ValueError, match=f"FrameProgressBar must know.* no data mod.* {to_pairs}"):
        trainer([FrameProgressBar()], enable_progress_bar=True).test(
            comparing, dataloaders=of_pairs.test_dataloader(), verbose=False
        )
    with pytest.raises(ValueError, match="a BoringModel measures none"):
        trainer([RecordWriter(out)]).test(BoringModel(), verbose=False)
    assert not out.exists()


def test_traces_of_a_batch_are_those_of_its_clips(tmp_path):
    found = []
    for batch in (1, 2):
        out = tmp_path / str(batch)
        measured(module(policies=["top-attention@3f"]), [TraceWriter(out)], 2, batch=batch)
        files = {path.name: np.load(path) for path in (out / "traces").iterdir()}
        found.append({n: {k: each[k] for k in each.files} for n, each in files.items()})
    one, two = found
    assert one.keys() == two.keys() and len(one) == 2
    for name, arrays in one.items():
        assert arrays.keys() == two[name].keys()
        for key, array in arrays.items():
            assert np.array_equal(array, two[name][key]), (name, key)
    first, second = one.values()
    assert any(not np.array_equal(first[key], second[key]) for key in first)


def test_a_clip_that_failed_is_not_rolled_out_again_for_its_features(tmp_path, monkeypatch):
    def broken(out, reference, index):
        return None if out is reference or index else "it broke"

    out, own = tmp_path / "run", {"frames": 24}
    with monkeypatch.context() as patch:
        patch.setattr("lightning_kv.tasks.evaluate.broken", broken)
        measured(module([FVD, "recall"], **own), [RecordWriter(out, report=False)], 3, batch=3)
    failed = [r for r in RunDirectory(out).records() if r["failure"]]
    assert [r["policy"] for r in failed] == [POLICY]
    monkeypatch.setattr("lightning_kv.tasks.evaluate.rollout", None)
    writer = RecordWriter(out, report=False)
    assert f"{POLICY}/{FVD}" in measured(module([FVD, "recall"], **own), [writer], 3, batch=3)


def test_worlds_that_an_encoder_refuses_are_not_rolled_out_again(tmp_path, monkeypatch):
    out, own = tmp_path / "run", {"frames": 24}
    monkeypatch.setattr("lightning_kv.tasks.evaluate.features", lambda *world: {})
    measured(module([FVD, "recall"], **own), [RecordWriter(out, report=False)], 2)
    kept = [len(np.load(path).files) for path in sorted((out / "features").rglob("*.npz"))]
    assert sorted(kept) == [0, 0, 1, 1, 1, 1]
    monkeypatch.setattr("lightning_kv.tasks.evaluate.rollout", None)
    measured(module([FVD, "recall"], **own), [RecordWriter(out, report=False)], 2)


def test_a_set_without_a_distance_ends_nothing(monkeypatch):
    monkeypatch.setattr(
        PanoramaEncoder, "forward", lambda self, clips: clips.new_ones(len(clips), 64)
    )
    with pytest.warns(UserWarning, match=rf"'{FVD}' has no value for full, {POLICY}. .* the same"):
        assert f"{POLICY}/recall" in measured(module([FVD, "recall"], frames=24), prompts=2)


def test_the_progress_bar_counts_prompts_and_not_clips():
    counts = []

    class Look(L.Callback):
        def on_test_batch_end(self, trainer, *_):
            counts.append(trainer.progress_bar_callback.bar.prompt)

    run = trainer([RolloutProgressBar(), Look()], enable_progress_bar=True)
    own = module(policies=["full", POLICY, "sink-window@6f"])
    run.test(own, datamodule=PromptDataModule(SHARDS, 2), verbose=False)
    assert counts == [0, 0, 1, 1, 1, 2]


def test_a_film_ends_where_the_clip_was_cut(tmp_path, video):
    """The shortest is damaged, so it is not shown; the others were cut to its length all the same.

    Without it they could be shown longer than they were measured.
    """
    for name, frames in (("full", 60), ("near", 50), ("far", 40)):
        video(tmp_path / name / "a.mp4", 1, frames=frames, size=(64, 64), noise=20)
    path = tmp_path / "far" / "a.mp4"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    own, data = pairs(tmp_path, "near", "far", length="shortest")
    out = tmp_path / "run"
    beside = [RecordWriter(out, report=False), PairVideos(out)]
    trainer(beside).test(own, datamodule=data, verbose=False)
    failures = {r["policy"]: r["failure"] for r in RunDirectory(out).records()}
    assert failures["far"] and not failures["near"]
    for folder in ("videos", "videos/difference"):
        with av.open(str(out / folder / "a.mp4")) as film:
            assert sum(1 for _ in film.decode(video=0)) == 40


@pytest.mark.slow
def test_real_videos_that_another_rank_skipped_are_said(tmp_path, video):
    """Of four, the second and the last are on the second rank."""
    for seed in range(2):
        for name in ("full", "near"):
            video(tmp_path / name / f"{seed}.mp4", seed, frames=8)
    for seed, key in enumerate("abcd", 3):
        video(tmp_path / "real" / f"{key}.mp4", seed, frames=5 if key in "bd" else 8)
    words = [sys.executable, "-m", "lightning_kv", "compare", str(tmp_path / "full")]
    words += [str(tmp_path / "near"), "--metrics", "fvd/random-3dconv", "--devices", "2"]
    words += ["--real", str(tmp_path / "real"), "--videos", "0", "--accelerator", "cpu"]
    words += ["--threads", "1"]

    def called(*more):
        return subprocess.run([*words, *more], capture_output=True, text=True, timeout=200)

    found = called("--out", str(tmp_path / "run"))
    assert found.returncode == 1, found.stderr
    for key in "bd":
        assert found.stdout.count(f"Skipped: real {key}: shorter than a window of") == 1
    strict = called("--out", str(tmp_path / "strict"), "--strict")
    assert strict.returncode == 2
    assert "2 real videos cannot be used, which --strict does not allow" in strict.stderr
    assert "The first: real b: shorter than" in strict.stderr


def test_a_test_that_was_interrupted_leaves_everything_usable(tmp_path, monkeypatch):
    out, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    own, data = module(["recall", "latent_mse"]), PromptDataModule(SHARDS, 3)
    writer, traces = RecordWriter(out, report=False), TraceWriter(out)
    right = measured(module(["recall", "latent_mse"]), prompts=3)

    class Stop(L.Callback):
        def __init__(self, at):
            self.at = at

        def on_test_batch_start(self, trainer, pl_module, batch, index, dataloader_idx=0):
            if index == self.at:
                raise KeyboardInterrupt

    first = measured(module(["recall", "latent_mse"]))
    for at, beside in ((4, []), (1, [RecordWriter(tmp_path / "other", report=False)])):
        try:
            with pytest.raises(SystemExit):
                trainer([writer, traces, Stop(at)]).test(own, datamodule=data, verbose=False)
        finally:
            signal.signal(signal.SIGINT, handler)
        assert measured(own, beside) == first, "what the interrupted one had is not counted"
    assert own.watching == [] and not data.finished
    lines = [json.loads(x) for x in (out / "records/rank-00000.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert trainer().test(own, datamodule=data, verbose=False)[0] == right
    with pytest.raises(ValueError, match="holds another run"):
        measured(module(["recall", "latent_mse"], seed=5), [writer], 3)
    assert trainer([writer]).test(own, datamodule=data, verbose=False)[0] == right
