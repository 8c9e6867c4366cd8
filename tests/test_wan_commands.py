"""Every command on the files of a (tiny, random) Wan: from a list of prompts to videos."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_kv import load_model, preset, rollout
from lightning_kv.cli import main
from lightning_kv.models.catalogue import CATALOGUE
from lightning_kv.models.embeddings import PromptBook
from lightning_kv.policies.head_curves import HeadCurves

pytestmark = pytest.mark.usefixtures("no_page")
PROMPTS = ["a red fox runs through snow", "a boat on a lake", "a city at night"]


def frames_of(path):
    with av.open(str(path)) as video:
        rate = float(video.streams.video[0].average_rate)
        return np.stack([f.to_ndarray(format="rgb24") for f in video.decode(video=0)]), rate


@pytest.fixture(scope="module")
def prompts(tiny_wan, tmp_path_factory):
    """A folder of prompt shards with their text states."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "list.txt").write_text("\n".join(PROMPTS))
    main(["encode", str(folder / "list.txt"), "--text", str(tiny_wan), "-o", str(folder / "set")])
    return folder / "set"


@pytest.fixture(scope="module")
def run(tiny_wan, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    main(
        [
            "evaluate",
            "--model",
            f"{tiny_wan / 'model.yaml'}",
            "--data.shards",
            str(prompts),
            "--policies",
            "[full,sliding-window@3f,longlive]",
            "--latents",
            "true",
            "--precision",
            "float32",
            "--prompts",
            "2",
            "--frames",
            "9",
            "--videos",
            "1",
            "--out",
            str(out),
        ]
    )
    return out


def model_of(folder, **given):
    return load_model(str(folder / "model.yaml"), precision="float32", **given)


def test_text_states_on_disk_are_the_encoders(tiny_wan, prompts):
    book, model = PromptBook(prompts), model_of(tiny_wan)
    assert book.prompts == [*PROMPTS, ""]
    found = torch.stack([book([prompt])[0] for prompt in PROMPTS])
    states = model.encoder(PROMPTS)
    # One step of bfloat16 between 2 and 4, where the largest are: batches may round apart.
    assert (found - states).abs().max() <= 2**-6
    assert (states[1:] - states[:-1]).abs().amax((1, 2)).min() > 1


@pytest.mark.slow
def test_an_evaluation_measures_the_rollouts_it_ran(tiny_wan, prompts, run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["policies"]) == {"full", "sliding-window@3f", "longlive"}
    records = [json.loads(x) for f in (run / "records").glob("*.jsonl") for x in f.open()]
    assert len(records) == 6 and not any(record["failure"] for record in records)
    name = "sliding-window@3f"
    record = next(r for r in records if r["policy"] == name and r["prompt"] == PROMPTS[1])
    model = model_of(tiny_wan, text=prompts)
    kwargs = {"seed": 0, "keys": [record["key"]]}
    full, less = (
        rollout(model, preset(policy), PROMPTS[1], 9, **kwargs) for policy in ("full", name)
    )
    mse = (full.latents - less.latents).double().square().mean()
    assert record["metrics"]["latent_mse"] == pytest.approx(float(mse), rel=1e-9)
    error = (full.frames - less.frames).double().square().flatten(2).mean(-1)[0]  # 33 pictures
    floored = error.clamp_min(1e-10)  # of every picture; then of every latent frame, and of all
    each = torch.cat([floored[:1], floored[1:].view(8, 4).mean(1)])
    assert record["metrics"]["psnr"] == pytest.approx(-10 * float(each.mean().log10()), rel=1e-6)
    assert len(record["curves"]["psnr"]) == 9
    with safe_open(run / "latents" / name / f"{record['key']}.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("latents"), less.latents[0])
        assert json.loads(file.metadata()["about"])["prompt"] == PROMPTS[1]
    assert record["cost"]["kv_read_fraction"] < 1


def test_the_fingerprint_knows_weights_text_vae_and_precision(run, tiny_wan):
    described = json.loads((run / "run.json").read_text())["described"]
    source = described["source"]
    assert source["precision"] == "float32" and source["key"] == "generator_ema"
    assert len({source["weights"], source["text"], source["vae"]}) == 3
    import hashlib

    digest = hashlib.sha256((tiny_wan / "generator.pt").read_bytes()).hexdigest()
    assert source["weights"] == digest


def test_another_strength_of_a_lora_is_another_run(tiny_wan, prompts, tmp_path, capsys):
    pair = {"A": torch.randn(4, 64), "B": torch.randn(64, 4) * 1e-3}
    names = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
    save_file({names.format(x): t for x, t in pair.items()}, tmp_path / "adapter_model.safetensors")
    words = ["evaluate", "--model", changed(tiny_wan, tmp_path, lora=str(tmp_path))]
    words += ["--data.shards", str(prompts), "--policies", "[full]", "--precision", "float32"]
    words += ["--frames", "3", "--videos", "0", "--decode", "false", "--out", str(tmp_path / "run")]
    words += ["--prompts", "1"]
    marks, config = [], tmp_path / "adapter_config.json"
    for alpha in (8, 2):
        config.write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        main(words)
        held = json.loads((tmp_path / "run" / "run.json").read_text())
        assert held["described"]["source"]["lora_strength"] == {8: "2", 2: "0.5"}[alpha]
        marks.append(held["fingerprint"])
    assert marks[0] != marks[1]
    config.write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "lora_strength" in capsys.readouterr().err


def test_another_precision_is_another_run(run, tiny_wan, prompts, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "evaluate",
                "--model",
                f"{tiny_wan / 'model.yaml'}",
                "--data.shards",
                str(prompts),
                "--policies",
                "[full,sliding-window@3f,longlive]",
                "--latents",
                "true",
                "--precision",
                "fast",
                "--prompts",
                "2",
                "--frames",
                "9",
                "--videos",
                "1",
                "--out",
                str(run),
            ]
        )
    assert stop.value.code == 2 and "precision" in capsys.readouterr().err


@pytest.mark.slow
def test_latents_become_videos_later(tiny_wan, run, capsys):
    main(["decode", str(run), "--vae", str(tiny_wan / "vae"), "--precision", "float32"])
    videos = sorted((run / "decoded").rglob("*.mp4"))
    assert len(videos) == 6 and "6 videos" in capsys.readouterr().out
    videos[3].unlink()
    before = [video.stat().st_mtime_ns for video in videos if video.exists()]
    main(["decode", str(run), "--vae", str(tiny_wan / "vae"), "--precision", "float32"])
    assert "1 video written" in (said := capsys.readouterr().out) and "5 were there" in said
    assert [v.stat().st_mtime_ns for v in videos if v != videos[3]] == before
    shown, rate = frames_of(videos[0])
    assert (shown.shape, rate) == ((33, 64 * 3, 96 * 3, 3), 16)  # small pictures are enlarged
    name = videos[0].stem
    latents = load_file(run / "latents" / "full" / f"{name}.safetensors")["latents"]
    expected = model_of(tiny_wan).codec.decode(latents[None])[0].permute(0, 2, 3, 1).numpy()
    expected = expected.repeat(3, axis=1).repeat(3, axis=2)
    assert np.abs(shown / 255 - expected).mean() < 0.05 < np.abs(shown / 255 - 0.5).mean()


def test_pictures_of_a_run_show_reference_and_policies(run):
    (video,) = (run / "videos").glob("*.mp4")
    shown, rate = frames_of(video)
    assert len(shown) == 33 and rate == 16
    assert shown.shape[2] >= 3 * 96
    assert "<video" in (run / "report.html").read_text()


def test_without_pixels_no_vae_is_needed(tiny_wan, prompts, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan, folder, ignore=shutil.ignore_patterns("vae", "text_encoder"))
    out = tmp_path / "run"
    main(
        [
            "evaluate",
            "--model",
            f"{folder / 'model.yaml'}",
            "--data.shards",
            str(prompts),
            "--policies",
            "[sliding-window@3f]",
            "--frames",
            "9",
            "--decode",
            "false",
            "--prompts",
            "2",
            "--out",
            str(out),
        ]
    )
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["policies"]["full"]["metrics"]) == ["latent_mse"]
    assert not list((out / "videos").rglob("*.mp4")) and list((out / "traces").glob("*.npz"))


@pytest.mark.parametrize("like", ["self-forcing", "causal-forcing-2step", "rolling-forcing"])
@pytest.mark.thinned(3)
def test_a_video_and_its_latents(tiny_wan, tmp_path, like, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan, folder)
    values = yaml.safe_load((folder / "model.yaml").read_text()) | {"like": like}
    (folder / "model.yaml").write_text(yaml.safe_dump(values))
    common = ["generate", PROMPTS[0], "--model", f"{folder / 'model.yaml'}", "--seconds", "2"]
    common += ["--policy", "full", "--prompt", f"{PROMPTS[1]}@1"]
    main([*common, "-o", str(tmp_path / "a.mp4")])
    said = capsys.readouterr().out
    frames = 9  # 32 pictures, in whole chunks
    assert f"({frames} latent)" in said and f"{1 + 4 * (frames - 1)} frames" in said
    main([*common, "-o", str(tmp_path / "a.safetensors")])
    main(
        [
            "decode",
            str(tmp_path / "a.safetensors"),
            "--vae",
            str(folder / "vae"),
            "-o",
            str(tmp_path / "b.mp4"),
        ]
    )
    first, later = (frames_of(tmp_path / f"{x}.mp4")[0].astype(int) for x in "ab")
    assert len(first) == 1 + 4 * (frames - 1)  # x264 may spend its bits differently, a little
    assert np.abs(first - later).mean() < 1 < np.abs(first[1:] - first[:-1]).mean()


def test_a_checkpoint_goes_round(tiny_wan, tmp_path, capsys):
    folder, back = tmp_path / "diffusers", tmp_path / "back.safetensors"
    main(
        [
            "convert",
            str(tiny_wan / "generator.pt"),
            "-o",
            str(folder),
            "--to",
            "diffusers",
            "--heads",
            "2",
        ]
    )
    main(["convert", str(folder), "-o", str(back), "--to", "original"])
    theirs = torch.load(tiny_wan / "generator.pt", weights_only=True)["generator_ema"]
    theirs = {k.replace("_fsdp_wrapped_module.", ""): v for k, v in theirs.items()}
    ours = load_file(back)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert "generator_ema" in capsys.readouterr().out


def test_a_model_file_says_where_its_own_weights_are(tiny_wan, tmp_path):
    """Another key of the same file is other weights, and paths are relative to the file."""
    values = yaml.safe_load((tiny_wan / "model.yaml").read_text())
    other = tmp_path / "raw.yaml"
    absolute = {k: str(tiny_wan / values[k]) for k in ("weights", "text", "vae")}
    other.write_text(yaml.safe_dump(values | absolute | {"key": "generator"}))
    raw, average = load_model(str(other)), load_model(str(tiny_wan / "model.yaml"))
    assert raw.source["key"] == "generator" and average.source["key"] == "generator_ema"
    mine = raw.network.patch_embedding.weight
    assert not torch.equal(mine, average.network.patch_embedding.weight)
    stored = torch.load(tiny_wan / "generator.pt", weights_only=True)["generator"]
    assert torch.equal(mine, stored["model.patch_embedding.weight"].bfloat16())


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def changed(tiny_wan, tmp_path, **values):
    path = tmp_path / "model.yaml"
    given = yaml.safe_load((tiny_wan / "model.yaml").read_text())
    given |= {k: str(tiny_wan / given[k]) for k in ("weights", "text", "vae")} | values
    path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
    return str(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"like": "self-forcin"}, ["Did you mean 'self-forcing'?"]),
        ({"wieghts": "x"}, ["No key 'wieghts'", "Did you mean 'weights'?"]),
        ({"weights": None}, ["no `name:`, `like:` and `weights:`"]),
        ({"config": {"dimm": 3}}, ["No setting 'dimm'", "Did you mean 'dim'?"]),
        ({"config": {}}, ["dim 64, 2 layers", "the size of wan-1.3b"]),
        ({"weights": "nowhere.pt"}, ["nowhere.pt"]),
        ({"key": "generator_raw"}, ["generator_raw", "generator_ema"]),
        ({"like": "krea-14b", "config": {}}, ["GiB in reference", "a GPU with more memory"]),
    ],
)
def test_a_model_file_that_cannot_work_is_said(tiny_wan, tmp_path, capsys, values, words):
    path, out = changed(tiny_wan, tmp_path, **values), tmp_path / "a.mp4"
    if "krea" in str(values) and torch.cuda.is_available():
        pytest.skip("a GPU may have the memory")
    error = refused(["generate", "x", "--model", path, "-o", str(out)], capsys)
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--size", "60x96"], "make no whole number of patches of 16 x 16. Use 64 x 96"),
        (["--seconds", "0"], "--seconds 0 makes no video"),
        (["--precision", "fp8"], "No precision profile 'fp8'"),
        (["--policy", "longlive@1f"], "budget of 'longlive@1f'"),
        (["--text", "nowhere"], "no Wan text encoder in nowhere"),
        (["--vae", "nowhere"], "no Wan VAE in nowhere"),
        (["--prompt", "x"], "TEXT@SECONDS"),
    ],
)
def test_a_video_that_cannot_be_made_is_said(tiny_wan, tmp_path, capsys, words, text):
    out = tmp_path / "a.mp4"
    given = ["generate", "x", "--model", f"{tiny_wan / 'model.yaml'}", "-o", str(out)]
    assert text in refused([*given, *words], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Nothing says which prompts"),
        (["--data.shards", "SET", "--metrics", "[recall]"], "it needs the panorama world"),
        (["--data.shards", "SET", "--metrics", "[psnr]", "--decode", "false"], "needs pixels"),
        (["--data.shards", "SET", "--context_frames", "3"], "has none to give. Use 0"),
        (["--data.shards", "SET", "--frames", "0"], "leave nothing to generate"),
        (["--data.shards", "SET", "--frames", "-3"], "leave nothing to generate"),
        (["--data.shards", "SET", "--size", "100x100"], "make no whole number of patches"),
    ],
)
def test_an_evaluation_that_cannot_run_is_said(tiny_wan, prompts, tmp_path, capsys, words, text):
    words = [str(prompts) if word == "SET" else word for word in words]
    out = tmp_path / "run"
    given = ["evaluate", "--model", f"{tiny_wan / 'model.yaml'}", "--out", str(out)]
    assert text in refused([*given, "--policies", "[full]", *words], capsys)
    assert not out.exists()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder of videos of 9 pixel frames, as three latent frames show."""
    return filmed(tmp_path_factory.mktemp("films"), (PROMPTS[1], "a cow"), 9)


def filmed(folder, prompts, frames):
    """Two videos, which get brighter, and their captions."""
    for name, prompt in zip("ab", prompts, strict=True):
        with av.open(str(folder / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for number in range(frames):
                grey = np.full((64, 96, 3), 20 * number % 256, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
            file.mux(stream.encode())
        (folder / f"{name}.txt").write_text(prompt)
    return folder


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--context_frames 0 takes none of them. Give --context_frames 3 or another"),
        (["--context_frames", "6"], "it has 9 frames, and --context_frames 6 shows 21. Use --con"),
        (["--context_frames", "4"], "4 context are no multiple of the model's chunk"),
        (["--context_frames", "3"], "Type `lightning-kv encode FILMS` first (a folder of videos"),
        (["--context_frames", "3", "--text", "SET"], "no text states for 'a cow'"),
        (["--data.shards", "SET", "--context_frames", "3"], "Give one of them"),
    ],
)
def test_videos_that_cannot_be_gone_on_from_are_said(
    tiny_wan, prompts, films, tmp_path, capsys, words, text
):
    words = [str(prompts) if word == "SET" else word for word in words]
    given = ["evaluate", "--model", f"{tiny_wan / 'model.yaml'}", "--out", str(tmp_path / "run")]
    given += ["--context_videos", str(films), "--policies", "[full]", "--frames", "12"]
    assert text.replace("FILMS", str(films)) in refused([*given, *words], capsys)
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_text_states_is_said(tiny_wan, prompts, tmp_path, capsys):
    given = ["generate", "a red fax", "--model", f"{tiny_wan / 'model.yaml'}"]
    error = refused([*given, "--text", str(prompts), "-o", str(tmp_path / "a.mp4")], capsys)
    assert "no text states for 'a red fax'" in error and "lightning-kv encode" in error


def test_a_file_of_something_else_is_no_latents(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    assert "holds no latents of a clip" in refused(["decode", str(path)], capsys)
    assert "no latents at" in refused(["decode", str(tmp_path)], capsys)
    assert not list(tmp_path.glob("*.mp4"))


def test_frames_that_are_no_multiple_of_the_chunk_end_with_a_shorter_one(tiny_wan, prompts):
    model = model_of(tiny_wan, text=prompts)
    short, long = (rollout(model, preset("full"), PROMPTS[0], n, seed=3) for n in (10, 12))
    assert torch.equal(short.latents[:, :9], long.latents[:, :9])
    assert short.frames.shape[1] == 37 and short.latents.isfinite().all()
    assert short.session.samples[0].stores["cond"][0].memory.groups[0].meta["frame_id"].max() == 9


def test_the_list_of_models_says_what_to_type(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    main(["list", "models"])
    text = capsys.readouterr().out
    assert "lightning-kv fetch longlive" in text and "CC BY-NC-SA" in text
    assert str(Path(tmp_path) / "self-forcing") in text


@pytest.mark.parametrize("like", CATALOGUE)
@pytest.mark.thinned(2)
def test_every_published_model_runs_as_its_authors_run_it(tiny_wan, tmp_path, like, capsys):
    """No option but the model: its own length, sampler and policy."""
    path = changed(tiny_wan, tmp_path, like=like, lora=None)
    values = yaml.safe_load(Path(path).read_text()) | {"lora": None}
    Path(path).write_text(yaml.safe_dump(values))
    main(["generate", "a red fox", "--model", path, "-o", str(tmp_path / "a.safetensors")])
    said = capsys.readouterr().out
    assert f"policy      {CATALOGUE[like].policy}" in said
    latents = load_file(tmp_path / "a.safetensors")["latents"]
    frames = 27 if like == "longlive" else 21  # 6 seconds where it knows as many, in whole chunks
    assert len(latents) == frames and latents.isfinite().all()


def test_a_guided_model_and_its_negative_prompt(tiny_wan, prompts, tmp_path):
    config = yaml.safe_load((tiny_wan / "model.yaml").read_text())["config"]
    config |= {"sampler": "flow", "guidance": 3.0, "timesteps": {"steps": 4, "shift": 5.0}}
    path = changed(tiny_wan, tmp_path, config=config)
    made = []
    for number, negative in enumerate(("", "blurry")):
        out = tmp_path / f"{number}.safetensors"
        main(["generate", "a red fox", "--model", path, "--negative", negative, "-o", str(out)])
        made.append(load_file(out)["latents"])
    assert not torch.equal(*made)
    out = tmp_path / "run"
    given = ["--data.shards", str(prompts), "--frames", "6", "--decode", "false"]
    given += ["--prompts", "1"]
    main(
        [
            "evaluate",
            "--model",
            path,
            *given,
            "--policies",
            "[sliding-window@3f]",
            "--out",
            f"{out}",
        ]
    )
    assert json.loads((out / "summary.json").read_text())["policies"]["sliding-window@3f"]


def test_latents_can_be_asked_for_later(tiny_wan, prompts, tmp_path):
    out = tmp_path / "run"
    given = ["evaluate", "--model", f"{tiny_wan / 'model.yaml'}", "--data.shards", str(prompts)]
    given += ["--policies", "[sliding-window@3f]", "--frames", "6", "--decode", "false"]
    given += ["--prompts", "2"]
    main([*given, "--out", str(out)])
    records = [x for f in (out / "records").glob("*.jsonl") for x in f.open()]
    main([*given, "--latents", "true", "--out", str(out)])
    assert len(list((out / "latents").rglob("*.safetensors"))) == 2 * 2
    assert [x for f in (out / "records").glob("*.jsonl") for x in f.open()] == records


def test_what_would_do_nothing_or_take_forever_is_refused(
    tiny_wan, prompts, tmp_path, capsys, monkeypatch
):
    model, out = f"{tiny_wan / 'model.yaml'}", str(tmp_path / "a.mp4")
    error = refused(["generate", "x", "--model", model, "--negative", "y", "-o", out], capsys)
    assert "runs without guidance" in error
    given = ["evaluate", "--model", model, "--out", str(tmp_path / "run")]
    error = refused([*given, "--data.shards", str(prompts), "--text", str(tiny_wan)], capsys)
    assert "runs no text encoder" in error and "lightning-kv encode" in error
    monkeypatch.setattr("lightning_kv.models.loading.memory_of", lambda device: 1e15)
    path = changed(tiny_wan, tmp_path, like="krea-14b", config={})
    words = ["generate", "x", "--model", path, "-o", out, "--accelerator", "cpu"]
    assert "14.3 billion parameters on a CPU" in refused(words, capsys)
    assert not list(tmp_path.glob("*.mp4")) and not (tmp_path / "run").exists()


SITES = ["--reach", "3f", "--chunks", "2", "--frames", "12", "--prompts", "2", "--probes", "1"]
SITES += ["--validate", "1", "--exact", "0", "--scorers", "recency", "--trainer.devices", "1"]


def calibrated(tiny_wan, out, *words):
    own = ["--model", str(tiny_wan / "model.yaml"), *SITES, "-o", str(out)]
    main(["calibrate", *own, "--trainer.accelerator", "cpu", *words])
    return HeadCurves.load(out)


@pytest.mark.filterwarnings("ignore:Validation on 1 prompt")
def test_heads_are_calibrated_on_prompts(tiny_wan, prompts, tmp_path):
    """In the casts of the original, as a real checkpoint is."""
    found = calibrated(tiny_wan, tmp_path / "heads.safetensors", "--data.shards", str(prompts))
    assert found.shape[0] == 2 and found.budgets == (0, 1, 2, 3)
    assert set(found.curves) == {f"recency/{own}" for own in ("mass", "output", "gn")}
    curve = found.prompts("recency", "gn")
    assert float(curve[..., 0].min()) > 1e-12 > 1e-24 > float(curve[..., -1].abs().max())
    assert found.about["model"]["precision"] == "reference"
    assert found.about["checks"]["floor"] < 1e-6


@pytest.mark.filterwarnings("ignore:Validation on 1 prompt")
def test_heads_are_calibrated_on_real_videos(tiny_wan, prompts, tmp_path):
    (tmp_path / "films").mkdir()
    filmed(tmp_path / "films", PROMPTS[:2], 45)  # 12 latent frames
    words = ["--videos", str(tmp_path / "films"), "--text", str(prompts)]
    found = calibrated(tiny_wan, tmp_path / "heads.safetensors", *words)
    assert found.about["data"]["prompts"] == ["a", "b"]
    assert float(found.prompts("recency", "gn")[..., 0].min()) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Validation on 1 prompt")
def test_budgets_are_proved_on_other_prompts(tiny_wan, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    heads = tmp_path / "heads.safetensors"
    calibrated(tiny_wan, heads, "--data.shards", str(prompts), "--scorers", "mass")
    Path("other.txt").write_text("".join(f"{number} boats\n" for number in range(8)))
    main(["encode", "other.txt", "--text", str(tiny_wan), "-o", "other"])
    capsys.readouterr()
    words = ["--model", str(tiny_wan / "model.yaml"), "--data.shards", "other", "--frames", "12"]
    words += ["--chunks", "1", "--prompts", "8", "--means", "1f", "--accelerator", "cpu", "--json"]
    main(["prove", "budgets", str(heads), *words])
    (own,) = json.loads(capsys.readouterr().out)["means"]
    losses = {row["rule"]: row["loss"] for row in own["rows"]}
    # Of three frames every head reads one: there is one way to give them.
    assert losses["uniform"] > 0 and losses["optimal"] == losses["uniform"] == losses["pyramid"]
    assert own["proof"]["verdict"] == "uniform" and own["found"] == 1
