"""Budgets on held-out prompts: a win that was planted, none where there is none to be had."""

import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "calibration"))
from curves import drawn
from tiny_network import TINY, encoder

from lightning_kv.calibration.chunks import chunk_losses
from lightning_kv.calibration.sites import SiteSettings, sites_of
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.make_shards import make_prompt_shards
from lightning_kv.models.samplers import keyed_noise
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout
from lightning_kv.stats.comparison import compare
from lightning_kv.stats.proof import prove
from lightning_kv.tasks.calibrate import CalibrateModule
from lightning_kv.tasks.callbacks import CurveWriter, ProofWriter
from lightning_kv.tasks.proof.design import Design, Source, select_part
from lightning_kv.tasks.proof.reads import nearly_uniform, proved
from lightning_kv.tasks.prove import ProveBudgetsModule

FRAMES = 15
LOSSES = {"x": [1.0], "y": [2.0]}
RULES = (
    "pyramid",
    "pyramid-reversed",
    "focused-matched",
    "published",
    "proportional",
    "log",
    "levels",
)


def model_of(spread, seed=0, constant=0):
    """A tiny Wan whose heads write with log-normal scales; heads all alike where the spread is 0.

    The first ``constant`` heads of each layer write the same whatever they read.
    """
    config = replace(TINY, dim=128, layers=2, heads=8, latent_size=(4, 8), channels=4, model="tiny")
    torch.manual_seed(seed)
    network = CausalWan(config).eval().requires_grad_(False)
    size = (spread * torch.randn(2, 8)).exp()
    for block, own in zip(network.blocks, size, strict=True):
        block.self_attn.o.weight.mul_(own.repeat_interleave(16))
        block.self_attn.v.weight[: 16 * constant] = 0
        block.self_attn.v.bias[: 16 * constant].normal_(0, 8)
    return VideoModel(network, None, lambda prompts: encoder(prompts).float(), name="tiny")


def ran(module, writer, data):
    """A run as a user's own few lines make it."""
    trainer = L.Trainer(
        callbacks=[writer],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    return writer.found


def prompts(folder, name, count=None):
    """Some of a set of prompts that no other set has."""
    if not (folder / name).is_dir():
        (folder / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(12)))
        make_prompt_shards(folder / f"{name}.txt", folder / name)
    return PromptDataModule(folder / name, count)


def fitted(folder, model):
    """The file of its head curves."""
    measuring = SiteSettings(reach=6, scorers=("mass",), chunks=1, steps=(0,), exact=())
    calibration = CalibrateModule(model, measuring, frames=FRAMES, validate=2, labels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two that validate are too few for an interval
        ran(calibration, CurveWriter(folder / "heads.safetensors"), prompts(folder, "fitted", 4))
    return folder / "heads.safetensors"


def proving(folder, model, means=(3,), **settings):
    return ProveBudgetsModule(
        model, folder / "heads.safetensors", means, chunks=1, frames=FRAMES, **settings
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Heads of which half always write the same, and the others much or little."""
    folder, model = tmp_path_factory.mktemp("planted"), model_of(1.0, constant=3)
    fitted(folder, model)
    module = proving(folder, model)
    found = ran(module, ProofWriter(folder / "proof"), prompts(folder, "others", 10))
    return folder, model, module, found


def test_budgets_win_where_heads_differ(planted):
    _, _, _, found = planted
    (own,) = found.means
    first, control = own.proof.comparisons[0], own.proof.placebo
    assert own.proof.verdict == "optimal" and own.proof.expected
    assert first.against == "uniform" and first.ratio < 0.7 and first.p < 0.01
    assert control.holds and control.better == 5 and control.p < 0.01
    assert own.found == first.ratio and abs(np.log(own.predicted / own.found)) < 0.3
    assert own.words[0].startswith("Optimal is better than uniform")
    assert "Curves alone, on the prompts they were solved on, predicted" in own.words[-1]
    rows = {row.rule: row for row in own.rows}
    whole = rows["focused-matched-zero"].against  # heads that always write the same look important
    assert whole.p > 0.05 and whole.low > rows["focused-matched"].against.high
    assert "Not measured" not in " ".join(found.words)


def test_budgets_do_not_win_where_heads_are_alike(tmp_path):
    model = model_of(0.0)
    fitted(tmp_path, model)
    writer = ProofWriter(tmp_path / "proof")
    found = ran(proving(tmp_path, model), writer, prompts(tmp_path, "others", 10))
    (own,) = found.means
    assert own.proof.verdict == "uniform"
    assert own.words[0].startswith("Uniform is enough here")


def test_the_table_is_that_of_the_records(planted):
    folder, _, module, found = planted
    run, design = ProofWriter(folder / "proof").run, module.design
    clips = [run.read(path.stem) for path in sorted((folder / "proof/clips").iterdir())]
    assert len(clips) == len(found.prompts) == found.chunks == 10
    (own,) = found.means
    sums, curves = {}, HeadCurves.load(folder / "heads.safetensors")
    values = curves.curve("mass", "gn")
    for row in own.rows:
        logs = [np.log(float(site[f"{row.rule}@3f"])) for c in clips for site in c.sites.values()]
        assert row.loss == pytest.approx(np.exp(np.mean(logs)))
        assert row.low < row.loss < row.high
        if row.rule == "uniform":
            even, flat = np.array(logs), float(values[..., 3].sum())
            sums["uniform"] = flat
            assert row.against is None and row.predicted == 1
            continue
        assert row.against.ratio == pytest.approx(np.exp(np.mean(logs - even)))
        if row.rule in RULES:
            table = curves.solve(row.rule, 3, least=1)
            parts = [values[i, j, n] for i, r in enumerate(table) for j, n in enumerate(r)]
            sums[row.rule] = float(sum(parts))
            assert row.predicted == pytest.approx((sums[row.rule] / flat) ** 0.5)
    names = list(sums)
    true = [
        np.mean([float(s[f"{n}@3f"]) ** 2 for c in clips for s in c.sites.values()]) for n in sums
    ]
    slope = np.polyfit(np.log([sums[n] for n in names]), np.log(true), 1)[0]
    assert len(found.tables) == 15 and found.additivity.slope == pytest.approx(slope, abs=0.2)
    assert {row.rule for row in own.rows if row.predicted is None} == {"dynamic", "dynamic-table"}
    again = proved(clips[::-1], design)
    assert again == found


def test_what_is_said_of_nearly_uniform_budgets():
    other = compare({"a": LOSSES, "b": LOSSES}, "a", "b")
    for low, high, said in (
        (0.99, 1.01, "came true"),
        (1.03, 1.2, "did not come true"),
        (0.7, 0.97, "did not come true"),
        (0.9, 1.01, "is neither shown nor excluded"),
        (None, None, "is not known with so few prompts"),
    ):
        text = nearly_uniform(replace(other, low=low, high=high))
        assert text.endswith(f"less than 2 % either way: that {said}.")


def test_a_record_is_the_change_that_a_chunk_takes(planted):
    """Sites, noise and parts once more, by hand."""
    folder, model, module, _ = planted
    item = prompts(folder, "others", 10).items()[4]
    record = ProofWriter(folder / "proof").run.read(item.key)
    ((chunk, step),) = record.sites
    assert step == 0 and (chunk,) == sites_of(item.key, FRAMES, 3, module.measuring)
    budget = {"part": "calibrated", "amount": "3f", "heads": str(folder / "heads.safetensors")}
    spec = {"part": "top-attention", "budget": budget | {"least": "1f"}}
    parts = {
        "optimal@3f": policy_from_dict({"name": "x", "select": spec}).select,
        "uniform@3f": policy_from_dict(
            {"name": "x", "select": {"part": "top-attention", "budget": "3f"}}
        ).select,
    }
    network, found = model.network, {}

    def before(call):
        if (call.step.chunk, call.step.step, call.step.phase) == (chunk, 0, "denoise"):
            noise = keyed_noise(0, [item.key], network.config.plan(FRAMES), (4, 4, 8))
            found.update(chunk_losses(call, noise, parts))

    window = preset("sliding-window@6f")
    rollout(model, window, item.prompt.prompt, FRAMES, keys=[item.key], decode=False, before=before)
    for name, loss in found.items():
        assert float(record.sites[chunk, 0][name]) == pytest.approx(loss, rel=1e-6)


def test_what_was_stopped_or_added_to_is_as_in_one_go(planted, tmp_path, monkeypatch):
    folder, model, _, found = planted
    writer, real, seen = ProofWriter(tmp_path / "proof"), ProveBudgetsModule.measured, []

    def stopped(self, item):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(item.key)
        return real(self, item)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(ProveBudgetsModule, "measured", stopped)
        ran(proving(folder, model), writer, prompts(folder, "others", 8))
    assert len(list((tmp_path / "proof/clips").iterdir())) == 3
    part = ran(proving(folder, model), writer, prompts(folder, "others", 8))
    assert len(part.prompts) == 8
    assert ran(proving(folder, model), writer, prompts(folder, "others", 10)) == found
    with pytest.raises(ValueError, match=r"holds another run.*means"):
        ran(proving(folder, model, (2,)), writer, prompts(folder, "others", 10))


def test_prompts_of_the_file_are_named(planted, tmp_path, monkeypatch):
    folder, model, _, found = planted
    record = ProofWriter(folder / "proof").run.read(found.prompts[0])

    def same(self, item):
        return replace(record, key=item.key, unit=item.prompt.key)

    monkeypatch.setattr(ProveBudgetsModule, "measured", same)
    with pytest.warns(UserWarning, match=r"were fitted on 4 prompts of this evaluation") as seen:
        ran(proving(folder, model), ProofWriter(tmp_path / "p"), prompts(folder, "fitted", 8))
    told = [str(own.message) for own in seen if "fitted" in str(own.message)]
    keys = prompts(folder, "fitted", 8).keys()
    assert len(told) == 1 and all(key in told[0] for key in keys[:4])
    assert not any(key in told[0] for key in keys[4:])


def test_what_does_not_fit_is_refused_before_anything_is_measured(planted, tmp_path):
    folder, model, _, _ = planted
    with pytest.raises(ValueError, match=r"on 7 no test.*Give 8 or more.*about 18"):
        ran(proving(folder, model), ProofWriter(tmp_path / "p"), prompts(folder, "others", 7))
    assert not (tmp_path / "p").exists()
    for means in ((0,), (6,), (7, 3)):
        with pytest.raises(ValueError, match=r"1 history frames are protected.*at 6, the reach"):
            proving(folder, model, means)
    for select in ("everything", "reach"):
        with pytest.raises(ValueError, match="whole frames by score"):
            proving(folder, model, select=select)
    with pytest.raises(ValueError, match=r"no curves focused/gn .* It has mass/gn"):
        proving(folder, model, select="focused")
    with pytest.raises(ValueError, match=r"no curves recency/gn"):
        proving(folder, model, scorer="recency")
    with pytest.raises(ValueError, match=r"No head curves are shipped for the model 'tiny'"):
        ProveBudgetsModule(model, "auto", frames=FRAMES)
    with pytest.raises(ValueError, match=r"made for another model: 2 layers of 8 heads"):
        ProveBudgetsModule("panorama", folder / "heads.safetensors", frames=FRAMES)
    with pytest.raises(ValueError, match="writes what a ProveBudgetsModule"):
        measuring = SiteSettings(reach=6, scorers=("mass",), chunks=1, exact=())
        calibration = CalibrateModule(model, measuring, frames=FRAMES)
        ran(calibration, ProofWriter(tmp_path / "p"), prompts(folder, "others", 10))
    with pytest.raises(ValueError, match="writes what a CalibrateModule"):
        writer = CurveWriter(tmp_path / "p.safetensors")
        ran(proving(folder, model), writer, prompts(folder, "others", 10))
    assert not any(tmp_path.iterdir())


def test_a_sampler_with_several_chunks_in_flight_is_refused(planted):
    folder, model, _, _ = planted
    network = CausalWan(replace(model.network.config, sampler="rolling")).eval()
    with pytest.raises(ValueError, match=r"its sampler is 'rolling'. .*--run"):
        proving(folder, VideoModel(network, None, encoder, name="tiny"))


def test_a_sink_that_the_part_may_leave_out_is_said(tmp_path, geometry):
    design = designed(tmp_path, geometry)
    assert not design.note
    curves = design.source.curves
    held = replace(curves, budgets=tuple(range(3, 10)), about=curves.about | {"cache": {"sink": 3}})
    own = replace(design, source=replace(design.source, curves=held), means=(4,))
    assert own.least == 3 and "first 3 frames always read" in own.note


def test_other_weights_of_the_model_are_said(planted):
    folder, _, _, _ = planted
    other = model_of(1.0, seed=5)
    other.source["sha256"] = "another"
    with pytest.warns(UserWarning, match="other weights of 'tiny'") as seen:
        module = proving(folder, other)
    assert [str(own.message) for own in seen] == [module.design.note]  # which the proof keeps
    other.source.pop("sha256")
    other.source["text"] = "that of other prompts"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proving(folder, other)


@pytest.fixture(scope="module")
def geometry():
    return model_of(1.0).network.geometry()


def designed(folder, geometry, keys=("mass/gn",), select="top-attention", metric="gn", means=()):
    drawn(geometry, range(7), keys=keys).save(folder / "drawn.safetensors")
    source = Source.of(folder / "drawn.safetensors", "tiny", select, None, metric)
    return Design(source, select_part(select), means, geometry)


def test_all_conditions_have_one_total(tmp_path, geometry):
    design = designed(tmp_path, geometry)
    assert design.means == (2, 3) and "focused-matched-zero" in design.absent
    for mean in design.means:
        for rule in design.rules:
            if (table := design.budgets(rule, mean)) is not None:
                assert int(table.sum()) == 16 * mean and int(table.min()) >= 1
    shuffles = [design.budgets(rule, 3).tolist() for rule in design.shuffled]
    best = design.budgets("optimal", 3)
    assert len(shuffles) == 5 and len(set(map(str, shuffles))) == 5
    dealt = [sorted(frames for row in own for frames in row) for own in shuffles]
    assert all(own == sorted(best.flatten().tolist()) for own in dealt)
    least = min(design.predicted(rule, 3) for rule in design.rules if "dynamic" not in rule)
    assert design.predicted("optimal", 3) == least


def test_what_a_part_cannot_do_is_left_out_and_said(tmp_path, geometry):
    design = designed(tmp_path, geometry, keys=("hfs/gn",), select="hfs")
    assert {"dynamic", "dynamic-table"} <= design.absent.keys()
    assert "only rank within a head" in design.absent["dynamic"]
    assert not {"dynamic", "dynamic-table"} & set(design.rules)


def test_curves_of_attention_alone_predict_no_loss(tmp_path, geometry, planted):
    folder = planted[0]
    run = ProofWriter(folder / "proof").run
    clips = [run.read(path.stem) for path in (folder / "proof/clips").iterdir()]
    design = designed(tmp_path, geometry, keys=("mass/mass",), metric="mass", means=(3,))
    found = proved(clips, design)
    assert found.additivity is None and found.means[0].predicted is None
    assert not any("predicted" in each for each in found.means[0].words)


def test_verdicts_are_those_of_the_statistics(planted):
    folder, _, module, found = planted
    run = ProofWriter(folder / "proof").run
    clips = [run.read(key) for key in found.prompts]
    losses = {
        rule: {c.unit: [float(s[f"{rule}@3f"]) for s in c.sites.values()] for c in clips}
        for rule in module.design.rules
    }
    own = prove(losses, shuffles=[f"shuffled-{n}" for n in range(1, 6)])
    assert own.words == found.means[0].proof.words
    assert own.comparisons == found.means[0].proof.comparisons


@pytest.mark.slow
def test_ranks_give_the_same(tmp_path):
    """1 and 2 ranks, and one that was killed."""
    from lightning_kv.models import load_model

    geometry = load_model("panorama", decode=False).network.geometry()
    drawn(geometry, range(7)).save(tmp_path / "heads.safetensors")
    words = [sys.executable, "-m", "lightning_kv", "prove", "budgets", "heads.safetensors"]
    words += ["--means", "3f", "--chunks", "1", "--frames", "15", "--context_frames", "6"]
    words += ["--prompts", "8", "--data.shards", "panorama-quick", "--accelerator", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def proof(name, *more):
        asked = [*words, "--records", name, "--json", *more]
        done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = proof("one")
    assert proof("two", "--devices", "2") == one
    started = subprocess.Popen([*words, "--records", "killed"], cwd=tmp_path, env=environment)
    clips = tmp_path / "killed/clips"
    while not (clips.is_dir() and len(list(clips.iterdir())) > 1):
        assert started.poll() is None
        time.sleep(0.05)
    started.kill()
    started.wait()
    assert len(list(clips.iterdir())) < 8
    assert proof("killed", "--devices", "3") == one
