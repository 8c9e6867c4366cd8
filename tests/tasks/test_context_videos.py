"""Rollouts that go on from videos: their frames are the context, and what follows the truth."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import av
import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightning_kv.cli import main
from lightning_kv.commands.evaluate import (
    COMMAND,
    FAST_PANS,
    DataOptions,
    EvaluateOptions,
    check_text,
    data_of,
    model_for,
    settled,
)
from lightning_kv.commands.parsing import parse
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.make_shards import make_video_shards
from lightning_kv.data.panorama import world_for
from lightning_kv.data.videos import read
from lightning_kv.metrics.suite import Suite
from lightning_kv.models.sources import find_model
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.features import FeatureStore
from lightning_kv.tasks.callbacks import RecordWriter
from lightning_kv.tasks.callbacks.policy_evaluation import PolicyEvaluation
from lightning_kv.tasks.evaluate import EvaluateModule
from lightning_kv.tasks.rollouts.context import panorama_start, start_of
from lightning_kv.tasks.rollouts.settings import RolloutSettings

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "data/panorama-quick"
REAL = ROOT.parent / "shared" / "videos" / "rollouts"
FRAMES, CONTEXT = 24, 6
SMALL = {"frames": FRAMES, "context_frames": CONTEXT}
FVD = "fvd/panorama-encoder"
POLICY = "sliding-window@6f"


def lossless(path, pixels, rate=8):
    """Pixels ``[T, 3, H, W]`` in [0, 1] as RGB in 8 bits, without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = (pixels * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264rgb", rate=rate, options={"qp": "0", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def filmed(folder, count=3, frames=FRAMES):
    """The first worlds of a set as videos that are called as the set's prompts are."""
    samples = PromptDataModule(SHARDS, count).prompt_samples()
    for sample in samples:
        world = world_for(sample.prompt, sample.world_seed)
        lossless(folder / f"{sample.key}.mp4", world.render(frames))
        (folder / f"{sample.key}.txt").write_text(sample.prompt)
    return {sample.key: sample for sample in samples}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Folder of the videos, and the prompts of the set by key."""
    folder = tmp_path_factory.mktemp("worlds")
    return folder, filmed(folder)


def evaluated(data, out=None, **given):
    """A run as a user's own few lines make it: its module and what it logged."""
    settings = SMALL | {"metrics": ["recall", "psnr"]} | given
    module = EvaluateModule("panorama", [POLICY], **settings)
    trainer = L.Trainer(
        callbacks=[RecordWriter(out, latents=True, report=False)] if out else [],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return module, found


def rounding(codec):
    """How far half a step of 8 bits in every pixel can move a latent, by channel."""
    return (codec.basis.abs().sum(0) / codec.scale * (0.5 / 255)).view(-1, 1, 1)


def test_a_filmed_world_gives_the_context_that_the_world_gives(worlds, panorama):
    folder, samples = worlds
    settings, codec = RolloutSettings(**SMALL), panorama.codec
    found = PromptDataModule(context_videos=folder).prompt_samples()
    assert [sample.key for sample in found] == sorted(samples)
    for sample in found:
        own = panorama_start(samples[sample.key], codec, FRAMES, CONTEXT)
        start = start_of(sample, panorama, settings)
        assert torch.equal(start.truth, (own.truth * 255).round().byte())
        eight = (own.truth * 255).round() / 255
        assert torch.equal(start.context, codec.encode(eight)[:CONTEXT])
        assert ((start.context - own.context).abs() <= rounding(codec) + 1e-5).all()
        assert (start.context - own.context).abs().max() > 0
        assert torch.equal(start.scene.positions, own.scene.positions)
        assert torch.equal(start.scene.code_book, own.scene.code_book)
        assert torch.equal(start.scene.ruler_book, own.scene.ruler_book)
        far = (start.scene.truth_latents - own.scene.truth_latents).abs()
        assert (far <= rounding(codec) + 1e-5).all()


def test_a_run_from_filmed_worlds_says_what_one_from_the_worlds_says(worlds, tmp_path):
    folder, _ = worlds
    names = ["recall", "revisit_error", "camera_rule", "psnr", FVD]
    data = PromptDataModule(context_videos=folder, prompts=2, batch=2)
    _, found = evaluated(data, metrics=names)
    keys = {sample.key for sample in data.prompt_samples()}
    own = PromptDataModule(SHARDS, 3)
    own.setup()
    own.finished = set(own.keys()) - keys
    _, usual = evaluated(own, metrics=names)
    assert found.keys() == usual.keys() and f"full/{FVD}" in found
    for name, value in found.items():
        assert value == pytest.approx(usual[name], rel=0.05, abs=0.02), name
    assert found[f"{POLICY}/recall"] < found["full/recall"] - 0.3


def test_a_video_that_ends_with_its_context_shows_no_truth(worlds, panorama, tmp_path):
    samples = filmed(tmp_path / "short", 2, CONTEXT)
    data = PromptDataModule(context_videos=tmp_path / "short")
    sample = data.prompt_samples()[0]
    start = start_of(sample, panorama, RolloutSettings(**SMALL))
    own = panorama_start(samples[sample.key], panorama.codec, FRAMES, CONTEXT)
    assert start.truth is None and start.real is None and not start.scene.has_truth
    assert ((start.context - own.context).abs() <= rounding(panorama.codec) + 1e-5).all()
    _, found = evaluated(data)
    assert found["full/recall"] > 0.9  # against its own first visits
    with pytest.raises(ValueError, match=rf"{FVD} compares.*6 frames, and a clip 24.*--frames 6"):
        evaluated(data, metrics=["recall", FVD])


def test_shards_of_videos_give_what_a_folder_gives(worlds, panorama, tmp_path):
    folder, _ = worlds
    make_video_shards(folder, tmp_path / "shards", shard_videos=2)
    loose, packed = (PromptDataModule(context_videos=x) for x in (folder, tmp_path / "shards"))
    assert [s[:3] for s in loose.prompt_samples()] == [s[:3] for s in packed.prompt_samples()]
    settings = RolloutSettings(**SMALL)
    for pair in zip(loose.prompt_samples(), packed.prompt_samples(), strict=True):
        first, second = (start_of(sample, panorama, settings) for sample in pair)
        assert torch.equal(first.truth, second.truth)
        assert torch.equal(first.context, second.context)
    tar = sorted((tmp_path / "shards").glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match="missing or damaged"):
        PromptDataModule(context_videos=tmp_path / "shards").keys()


def test_what_a_run_is_made_of_knows_videos_and_captions(worlds, tmp_path):
    folder = tmp_path / "worlds"
    shutil.copytree(worlds[0], folder)
    first, *others = sorted(folder.glob("*.mp4"))
    before = PromptDataModule(context_videos=folder).describe()
    assert len(before["context_videos"]["files"]) == 3 and "shards" not in before
    assert PromptDataModule(context_videos=folder).describe() == before
    shutil.copy(others[0], first)
    other = PromptDataModule(context_videos=folder).describe()
    assert other["context_videos"]["files"] != before["context_videos"]["files"]
    first.with_suffix(".txt").write_text("noon fast n10 left")
    again = PromptDataModule(context_videos=folder).describe()
    assert again["context_videos"]["prompts"] != other["context_videos"]["prompts"]
    assert PromptDataModule(context_videos=folder, prompts=2).describe() != again


def test_a_video_is_a_unit_even_if_another_has_its_caption(worlds, tmp_path):
    folder, _ = worlds
    video = sorted(folder.glob("*.mp4"))[0]
    for name in ("a", "deep/er"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, tmp_path / "v" / f"{name}.mp4")
        shutil.copy(video.with_suffix(".txt"), tmp_path / "v" / f"{name}.txt")
    data = PromptDataModule(context_videos=tmp_path / "v", samples=2)
    evaluated(data, tmp_path / "run", frames=9, metrics=["latent_mse"])
    records = RunDirectory(tmp_path / "run").records()
    assert {(r["key"], r["unit"]) for r in records} == {
        ("a", "a"),
        ("a-s1", "a"),
        ("deep__er", "deep__er"),
        ("deep__er-s1", "deep__er"),
    }


def test_a_training_judges_policies_on_videos(worlds):
    """As far as its start: what cannot be given is refused before the first step."""
    data = PromptDataModule(context_videos=worlds[0], prompts=1)
    watch = PolicyEvaluation([POLICY], data, 1, frames=12, context_frames=0, metrics=["recall"])
    module = EvaluateModule("panorama", [POLICY], metrics=["recall"], **SMALL)
    with pytest.raises(ValueError, match="--context_frames 0 takes none"):
        watch.on_fit_start(L.Trainer(logger=False, accelerator="cpu"), module)


WORDS = ["--frames", "24", "--context_frames", "6", "--policies", f"[{POLICY}]"]
WORDS += ["--metrics", f"[recall,psnr,{FVD}]", "--videos", "1"]


def records(out):
    """Everything that was measured, whoever did."""
    return {
        (r["policy"], r["key"]): (r["unit"], r["prompt"], r["metrics"], r["curves"])
        for r in RunDirectory(out).records()
    }


@pytest.mark.slow
def test_two_ranks_and_a_run_taken_up_say_what_one_says(worlds, tmp_path, capsys):
    """Two ranks go on where one was cut off, and two do it all: the same records and means."""
    words = ["evaluate", "--context_videos", str(worlds[0]), *WORDS]
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    main([*words, "--trainer.devices", "1", "--out", str(one)])
    whole = records(one)
    assert len(whole) == 6 and len(list((one / "videos").glob("*.mp4"))) == 1
    shutil.copytree(one, cut)
    (file,) = (cut / "records").iterdir()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for out in (two, cut):
        more = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--out", str(out)]
        start = [sys.executable, "-m", "lightning_kv", *words, *more]
        done = subprocess.run(start, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        assert records(out) == whole
        assert {r["rank"] for r in RunDirectory(out).records()} == {0, 1}
        found, usual = (
            json.loads((each / "summary.json").read_text())["policies"][POLICY]["metrics"]
            for each in (out, one)
        )
        assert found["recall"]["mean"] == pytest.approx(usual["recall"]["mean"], rel=1e-12)
        assert found[FVD]["mean"] == pytest.approx(usual[FVD]["mean"], rel=1e-9)
    video = sorted(worlds[0].glob("*.mp4"))[0]
    changed = tmp_path / "changed"
    shutil.copytree(worlds[0], changed)
    shutil.copy(sorted(changed.glob("*.mp4"))[1], changed / video.name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--context_videos", str(changed), *words[3:], "--out", str(one)])
    assert stop.value.code == 2 and "context_videos.files" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_set(tiny_wan, tmp_path_factory):
    """Shards of two real videos, with the text states of their captions."""
    if not REAL.is_dir():
        pytest.skip("../shared/videos is not here")
    folder = tmp_path_factory.mktemp("real")
    for name in ("longlive_5s_01_baseline", "self_forcing_5s_02_baseline"):
        (folder / "videos").mkdir(exist_ok=True)
        shutil.copy(REAL / f"{name}.mp4", folder / "videos")
        (folder / "videos" / f"{name}.txt").write_text(f"what {name} shows")
    make_video_shards(folder / "videos", folder / "set")
    main(["encode", str(folder / "set"), "--text", str(tiny_wan)])
    return folder / "set"


def resized(pixels):
    """Frames at 64 x 96, in 8 bits again."""
    size = {"mode": "bicubic", "antialias": True, "align_corners": False}
    return torch.nn.functional.interpolate(pixels.float(), (64, 96), **size).round().clamp(0, 255)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [True, False])
def test_a_wan_goes_on_from_real_videos(tiny_wan, real_set, tmp_path, decode):
    """The context is what diffusers' own VAE makes of the frames, resized and in 8 bits again."""
    from diffusers import AutoencoderKLWan

    out = tmp_path / "run"
    words = ["evaluate", "--model", str(tiny_wan / "model.yaml"), "--context_videos", str(real_set)]
    words += ["--context_frames", "3", "--frames", "9", "--size", "64x96", "--latents", "true"]
    words += ["--policies", "[sliding-window@3f]", "--precision", "float32", "--videos", "1"]
    sets = ",fvd/random-3dconv" if decode else ""
    words += ["--metrics", f"[latent_mse{sets}]", "--decode", str(decode).lower()]
    main([*words, "--trainer.devices", "1", "--out", str(out)])
    vae = AutoencoderKLWan.from_pretrained(tiny_wan / "vae").eval()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (
        vae.config.latents_mean, vae.config.latents_std))  # fmt: skip
    for record in RunDirectory(out).records():
        assert record["unit"] == record["key"] and record["prompt"].startswith("what ")
        pixels = resized(next(read(REAL / f"{record['key']}.mp4", 9)))
        signed = pixels.div(127.5).sub(1).movedim(1, 0)[None]
        with torch.no_grad():
            latents = ((vae.encode(signed).latent_dist.mode() - mean) / std)[0].movedim(0, 1)
        file = out / "latents" / record["policy"] / f"{record['key']}.safetensors"
        found = load_file(file)["latents"][:3]
        torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-5)
        assert found.std() > 0.005
    assert len(RunDirectory(out).records()) == 4
    if decode:  # 24 frames after the context are three windows of 8, of the video as it is
        encoder = Suite(["fvd/random-3dconv"], {"pixels"}).encoders()["random-3dconv"]
        for key in {record["key"] for record in RunDirectory(out).records()}:
            windows = encoder.windows(9)
            windows.add(resized(next(read(REAL / f"{key}.mp4", 33))) / 255)
            held = FeatureStore(RunDirectory(out).features).read(None, key)["random-3dconv"]
            assert held.shape[0] == 3
            np.testing.assert_allclose(held, windows.features().numpy(), rtol=1e-5, atol=1e-6)


def test_another_rate_and_another_shape_are_said(tmp_path):
    lossless(tmp_path / "a.mp4", torch.rand(FRAMES, 3, 32, 48), rate=16)
    (tmp_path / "a.txt").write_text("dusk fast n7 left")
    module = EvaluateModule("panorama", [POLICY], metrics=["recall"], **SMALL)
    with pytest.warns(UserWarning) as told:
        module.check_data(PromptDataModule(context_videos=tmp_path))
    rate, shape = (str(each.message) for each in told)
    assert "shows 16 in a second, and a clip 8" in rate
    assert "has 32 x 48 pixels, and is stretched to 32 x 32" in shape


def test_a_data_module_of_its_own_need_not_say_its_prompts(worlds):
    """One that is no subclass: its videos are checked, and its prompts as they come."""

    class Own(L.LightningDataModule):
        video_infos = PromptDataModule(context_videos=worlds[0]).video_infos

    module = EvaluateModule("panorama", [POLICY], metrics=["recall"], **SMALL)
    module.check_data(Own())
    Own.prompt_texts = lambda self: ["a red fox"]
    with pytest.raises(ValueError, match="does not understand the prompt 'a red fox'"):
        module.check_data(Own())


def test_videos_of_a_named_data_module_leave_out_the_usual_shards(worlds):
    own = "lightning_kv.data.datamodule:PromptDataModule"
    init = {"context_videos": str(worlds[0])}
    options = EvaluateOptions(data=DataOptions(class_path=own, init_args=init))
    options = settled(options, find_model("panorama"))
    assert options.data.shards is None
    assert len(data_of(options).keys()) == 3
    options = settled(EvaluateOptions(data=DataOptions(class_path=own)), find_model("panorama"))
    assert options.data.shards == FAST_PANS


def test_prompts_of_a_named_data_module_need_text_states_too():
    options = EvaluateOptions(data=DataOptions(class_path="mine:Texts"))
    with pytest.raises(ValueError, match=r"Given --data.class_path mine:Texts. Give --text"):
        check_text(options, replace(find_model("panorama"), text=None))


@pytest.mark.parametrize("videos", [True, False])
def test_without_pixels_the_codec_is_kept_for_videos_of_any_data_module(worlds, videos):
    data = L.LightningDataModule()
    data.video_infos = PromptDataModule(context_videos=worlds[0]).video_infos if videos else {}
    options = EvaluateOptions(decode=False, precision="float32")
    with mock.patch("lightning_kv.models.loading.load_model") as load:
        model_for(options, find_model("panorama"), data, torch.device("cpu"))
    assert load.call_args.kwargs["decode"] is videos


def test_null_drops_the_shards_of_a_settings_file(worlds):
    words = ["-c", str(ROOT / "configs/quickstart.yaml"), "--context_videos", str(worlds[0])]
    options = parse(COMMAND, [*words, "--data.shards", "null", "--prompts", "2"])
    options = settled(options, find_model("panorama"))
    assert options.data.shards is None and len(data_of(options).keys()) == 2


@pytest.mark.parametrize("ends", [("y", "z"), ("é" * 40, "ö" * 40)], ids=["ascii", "bytes"])
def test_long_names_of_videos_are_shortened_in_results(tmp_path, ends):
    folder, out = tmp_path / "v", tmp_path / "run"
    for end in ends:
        captioned(folder, frames=CONTEXT, name="x" * (240 - len(end.encode())) + end)
    captioned(folder, frames=CONTEXT, name="a" * 120)
    data = PromptDataModule(context_videos=folder)
    evaluated(data, out, frames=9, metrics=["latent_mse"])
    keys = {record["key"] for record in RunDirectory(out).records()}
    assert len(keys) == 3 and "a" * 120 in keys and all(len(k.encode()) <= 120 for k in keys)


class Blind:
    """A codec that only decodes."""

    def decode(self, latents):
        return latents

    def stream(self, latents):
        return iter(latents)


def test_the_panorama_has_one_size_without_videos_too():
    with pytest.raises(ValueError, match=r"Given --size 64x64\. Use 32x32"):
        EvaluateModule("panorama", [POLICY], size="64x64", **SMALL)
    assert EvaluateModule("panorama", [POLICY], size="32x32", **SMALL).latent_size == (4, 4)


@pytest.mark.parametrize(("codec", "what"), [(None, "no codec"), (Blind(), "a Blind without")])
def test_a_model_that_cannot_encode_is_refused(worlds, panorama, codec, what):
    module = EvaluateModule(
        replace(panorama, codec=codec), [POLICY], metrics=["latent_mse"], decode=False, **SMALL
    )
    said = rf"cannot go on from a video: it has {what}.*decode=False.*load_model\(NAME\)"
    with pytest.raises(ValueError, match=said):
        module.check_data(PromptDataModule(context_videos=worlds[0]))


def captioned(folder, text="dusk fast n7 left", frames=FRAMES, name="a"):
    lossless(folder / f"{name}.mp4", torch.rand(frames, 3, 32, 32))
    if text:
        (folder / f"{name}.txt").write_text(text)


def silent(folder):
    captioned(folder, "", name="b")


def short(folder):
    captioned(folder, frames=7, name="b")


def unknown(folder):
    captioned(folder, "a red fox", name="b")


def deaf(folder):
    """A file with sound and no picture."""
    with av.open(str(folder / "b.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    (folder / "b.txt").write_text("dusk fast n7 left")


def gone(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def confused(folder):
    """Called as the second noise of the other."""
    captioned(folder, name="a-s1")


BAD = [
    (confused, ["--samples", "2"], "Given sample 0 of 'a-s1' and sample 1 of 'a' of VIDEOS, both"),
    (gone, [], "There are no videos in"),
    (silent, [], "1 of 2 videos in VIDEOS have none, such as 'b'. Write it into a .txt"),
    (short, ["--context_frames", "9"], "7 frames, and --context_frames 9 shows 9. Use"),
    (short, ["--context_frames", "9"], "--context_frames 6 at most"),
    (short, ["--metrics", f"[{FVD}]"], "--frames 6 at most"),
    (unknown, [], "does not understand the prompt 'a red fox'"),
    (unknown, [], "The caption of VIDEOS/b.mp4 cannot be used. The panorama"),
    (deaf, [], "streams ['audio'], none of them a video"),
    (None, ["--context_frames", "0"], "--context_frames 0 takes none of them. Give --con"),
    (None, ["--data.shards", str(SHARDS)], "Give one of them"),
    (None, ["-c", "configs/quickstart.yaml"], "--data.shards null drops those of a settings"),
    (
        None,
        ["--context_videos", "nope"],
        "no videos in nope. Given no folder and no table. Give",
    ),
    (None, ["--context_videos", "README.md"], "or a table of pairs (.csv)"),
    (None, ["--size", "30x30"], "make no whole number of patches of 8 x 8. Use 32 x 32"),
    (None, ["--size", "64x64"], "Given --size 64x64. Use 32x32"),
    (None, ["--prompts", "2"], "prompts=2 was given and VIDEOS holds 1"),
    (None, ["--data.class_path", "tests.tasks.test_context_videos:Deaf"], "would not be used"),
]


class Deaf(L.LightningDataModule):
    """A data module that takes no videos."""


@pytest.mark.parametrize(("spoilt", "words", "said"), BAD, ids=[said for *_, said in BAD])
def test_what_does_not_fit_is_said_before_anything_is_written(
    tmp_path, spoilt, words, said, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    videos = tmp_path / "v"
    captioned(videos)
    if spoilt:
        spoilt(videos)
    start = ["evaluate", "--context_videos", str(videos), "--frames", "24", "--context_frames", "6"]
    start += ["--policies", f"[{POLICY}]", "--trainer.devices", "1", "--out"]
    with pytest.raises(SystemExit) as stop:
        main([*start, str(tmp_path / "run"), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ")
    assert said.replace("VIDEOS", str(videos)) in " ".join(error.split())
    assert not (tmp_path / "run").exists()
