"""The commands: configurations, errors, results on disk, resume, launchers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_kv.cli import COMMANDS, main, parse
from lightning_kv.commands.calibrate import CalibrateOptions
from lightning_kv.commands.distill import DistillOptions
from lightning_kv.commands.evaluate import EvaluateOptions
from lightning_kv.models.embedded import WEIGHTS
from lightning_kv.tasks.options import PretrainEncoderOptions, PretrainOptions

ROOT = Path(__file__).parents[1]
SMALL = [
    "--data.shards",
    str(ROOT / "data/panorama-quick"),
    "--prompts",
    "3",
    "--frames",
    "24",
    "--context_frames",
    "12",
    "--policies",
    "[full,sliding-window@6f,random@6f]",
    "--videos",
    "1",
]


def run(words, **env):
    """A command in a process of its own, as a user would start it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    found = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=clean | {"OMP_NUM_THREADS": "1"} | env,
    )
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One small evaluation in one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    found = run([sys.executable, "-m", "lightning_kv", "evaluate", *SMALL, "--out", str(out)])
    assert found.returncode == 0, found.stderr
    return out, found.stdout


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_the_run_directory_is_complete(single):
    out, text = single
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "records",
        "report.html",
        "report.md",
        "run.json",
        "summary.json",
        "table.tex",
        "traces",
        "videos",
    }
    assert len(list((out / "videos").glob("*.mp4"))) == len(list((out / "traces").iterdir())) == 1
    assert len(list((out / "videos" / "difference").glob("*.mp4"))) == 1
    assert "3 prompts cannot give 95 % confidence" in text
    assert "3 prompts cannot give 95 % confidence" in (out / "report.html").read_text()
    lines = [json.loads(x) for p in (out / "records").iterdir() for x in p.read_text().splitlines()]
    assert len(lines) == 9
    assert {"policy", "key", "metrics", "cost"} <= lines[0].keys()
    found = summary(out)
    assert {"schema", "fingerprint", "reference", "model", "run", "policies"} <= found.keys()
    assert found["run"]["prompts"] == 3
    full = found["policies"]["full"]
    assert full["metrics"]["latent_mse"]["mean"] == 0
    assert full["metrics"]["psnr"]["mean"] == pytest.approx(100, rel=1e-12)
    assert full["cost"]["kv_read_fraction"] == 1
    window = found["policies"]["sliding-window@6f"]
    assert window["metrics"]["latent_mse"]["mean"] > 0
    # chunks 4 to 7 read 12, 15, 18, 21 frames in full and 6 in the window
    assert window["cost"]["kv_read_fraction"] == pytest.approx(24 / 66)
    assert window["cost"]["kv_bytes_peak"] < full["cost"]["kv_bytes_peak"]
    for name in found["policies"]:
        assert name in text


def test_its_config_gives_the_same_run_again(single, tmp_path):
    out, _ = single
    options = parse("evaluate", ["-c", str(out / "config.yaml")])
    assert options.frames == 24 and options.policies[1] == "sliding-window@6f"


def test_the_summary_is_the_mean_of_the_records(single):
    out, _ = single
    records = [
        json.loads(x) for p in (out / "records").iterdir() for x in p.read_text().splitlines()
    ]
    for name, policy in summary(out)["policies"].items():
        values = [r["metrics"]["recall"] for r in records if r["policy"] == name]
        assert policy["metrics"]["recall"]["mean"] == pytest.approx(sum(values) / len(values))


def comparable(out):
    """Everything but timing."""
    return (
        {
            (name, metric): value["mean"]
            for name, policy in summary(out)["policies"].items()
            for metric, value in policy["metrics"].items()
        }
        | {
            (name, key): policy["cost"][key]
            for name, policy in summary(out)["policies"].items()
            for key in policy["cost"]
            if key.startswith("kv_") and policy["cost"][key] is not None
        }
        | {
            (name, "n"): policy["metrics"]["recall"]["n"]
            for name, policy in summary(out)["policies"].items()
        }
    )


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "trainer": [sys.executable, "-m", "lightning_kv", "evaluate", "--trainer.devices", "2"],
    "console": [str(BIN / "lightning-kv"), "evaluate", "--trainer.devices", "2"],
    "fabric": [
        str(BIN / "fabric"),
        "run",
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        "--strategy",
        "ddp",
        "tools/evaluate.py",
        "--",
    ],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "tools/evaluate.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_numbers_of_one(single, tmp_path, launcher):
    out = tmp_path / "run"
    found = run([*LAUNCHERS[launcher], *SMALL, "--out", str(out)])
    assert found.returncode == 0, found.stderr
    assert comparable(out) == pytest.approx(comparable(single[0]), rel=1e-6)
    files = {p.name: p.read_text().splitlines() for p in (out / "records").iterdir()}
    assert sorted(map(len, files.values())) == [3, 6], "each prompt on exactly one rank"
    assert found.stdout.count("summary.json") == 1, "one job, one table"


def test_an_interrupted_run_goes_on(single, tmp_path, no_page):
    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    (path,) = (out / "records").iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:50])
    (out / "summary.json").unlink()
    main(["evaluate", *SMALL, "--out", str(out)])
    assert comparable(out) == comparable(single[0])
    assert path.read_text().splitlines()[:6] == [x.strip() for x in lines[:6]], (
        "finished clips stay"
    )


@pytest.mark.slow
def test_an_interrupted_run_in_batches_goes_on(tmp_path):
    """A clip that is rolled out again beside other neighbours is not measured twice."""
    out = tmp_path / "run"
    words = ["evaluate", *SMALL, "--batch", "3", "--videos", "0", "--out", str(out)]
    words += ["--metrics", "[recall,psnr]"]
    main(words)
    (path,) = (out / "records").iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    main(words)
    again = path.read_text().splitlines(keepends=True)
    assert again[: len(lines) - 2] == lines[:-2]
    found = [(r["policy"], r["key"]) for r in map(json.loads, again)]
    assert len(found) == len(set(found)) == 9


@pytest.mark.slow
def test_pictures_that_are_missing_are_made_when_a_run_goes_on(single, tmp_path):
    """Of a finished run, more pictures; a trace that was lost; and a prompt that is half done."""
    from lightning_kv.runs.traces import read_traces

    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    (trace,), (records,) = (out / "traces").iterdir(), (out / "records").iterdir()
    first, lines = read_traces(trace), records.read_text().splitlines(keepends=True)
    assert list(first) == ["full", "sliding-window@6f", "random@6f"]
    assert first["full"]["held"].shape == (8, 6, 4, 24)
    assert (first["full"]["held"][7, ..., :21] == 255).all()
    trace.unlink()
    half = [line for line in lines[:-1] if json.loads(line)["key"] != trace.stem]
    half += [line for line in lines if json.loads(line)["key"] == trace.stem]
    records.write_text("".join(half))
    main(["evaluate", *SMALL, "--videos", "2", "--out", str(out)])
    names = {path.stem for path in (out / "videos").glob("*.mp4")}
    assert names == {path.stem for path in (out / "traces").iterdir()} and len(names) == 2
    again = read_traces(trace)
    for policy, arrays in first.items():
        for name, array in arrays.items():
            assert (array == again[policy][name]).all()
    found = [(r["policy"], r["key"]) for r in map(json.loads, records.read_text().splitlines())]
    assert len(found) == len(set(found)) == 9, "what was measured is not measured again"
    assert comparable(out) == pytest.approx(comparable(single[0]), rel=1e-6)
    before = {p: p.stat().st_mtime_ns for d in ("videos", "traces") for p in (out / d).glob("*.*")}
    main(["evaluate", *SMALL, "--videos", "2", "--out", str(out)])
    assert before == {p: p.stat().st_mtime_ns for p in before}, "nothing was left to do"


def test_budgets_cross_policies_and_every_prompt_is_pictured(tmp_path, capsys, no_page):
    out = tmp_path / "run"
    words = ["--policies", "[full,sliding-window,random]", "--budgets", "3f,6f", "--prompts", "2"]
    words += ["--frames", "15", "--metrics", "recall,psnr"]
    main(["evaluate", *SMALL[:-2], *words, "--out", str(out)])
    names = ["full", "sliding-window@3f", "sliding-window@6f", "random@3f", "random@6f"]
    assert list(summary(out)["policies"]) == names
    assert len(list((out / "videos").glob("*.mp4"))) == len(list((out / "traces").iterdir())) == 2
    main(["evaluate", "-c", str(out / "config.yaml")])  # the same run: nothing is left to do
    text = capsys.readouterr().out
    assert text.count("Results are in") == 2


def test_a_rollout_that_breaks_is_a_failure_on_record(tmp_path, monkeypatch, no_page):
    """NaN latents of one policy leave the others measured, and JSON without NaN."""
    import torch

    from lightning_kv.tasks import evaluate as task

    def breaking(model, policy, *given, **options):
        out = rollout(model, policy, *given, **options)
        if policy.name == "random@6f":
            out.latents[:, 14:] = torch.nan
        return out

    rollout = task.rollout
    monkeypatch.setattr(task, "rollout", breaking)
    out = tmp_path / "run"
    words = ["--prompts", "2", "--policies", "[full,random@6f]"]
    main(["evaluate", *SMALL, *words, "--out", str(out)])
    text = (out / "summary.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))["policies"]
    broken = found["random@6f"]["metrics"]["recall"]
    assert (broken["mean"], broken["n"]) == (None, 0)
    assert broken["status"] == "2 of 2 clips failed: the latents are not finite from frame 14 on"
    assert found["full"]["metrics"]["recall"]["status"] == "ok"


def test_a_share_in_a_policy_name_is_a_name_like_others(tmp_path, no_page):
    out = tmp_path / "run"
    words = ["--policies", "[top-attention@0.25]", "--prompts", "1", "--frames", "15"]
    main(["evaluate", *SMALL, *words, "--out", str(out)])
    found = summary(out)["policies"]
    assert set(found) == {"full", "top-attention@0.25"}
    assert found["full"]["metrics"]["psnr"]["status"] == "no value: this is the reference itself"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--policies", "[ful]"], "No policy 'ful'. Did you mean 'full'?"),
        (["--policies", "[]"], "No policies to evaluate"),
        (["--policies", "[full,full]"], "Two policies are called 'full'"),
        (["--metrics", "[psrn]"], "Did you mean 'psnr'?"),
        (["--policies", "[random@0f]"], "'0f' is out of range"),
        (["--policies", "[random@30f]"], "must lie between 3f and 21f"),
        (["--frames", "25"], "no multiple of the model's chunk of 3 frames. Use 24 or 27"),
        (["--context_frames", "24"], "leave nothing to generate"),
        (["--prompts", "0"], "Use 1 to 32"),
        (["--prompts", "33"], "Use 1 to 32"),
        (["--promts", "3"], "No setting 'promts'. Did you mean 'prompts'?"),
        (["--frames", "many"], "frames"),
        (["--model", "panorma"], "No model 'panorma'. Did you mean 'panorama'?"),
        (["--model", "wan-1.3b"], "'wan-1.3b' is a size, without weights"),
        (["--model", "nowhere.safetensors"], "No weights file nowhere.safetensors"),
        (["--data.shards", "nowhere"], "nowhere"),
        (["--threads", "0"], "leaves nobody to work"),
        (["--trainer.devices", "0"], "starts no process"),
        (
            ["--policies", "[{name: full, retain: {part: window, budget: 3f}}]"],
            "like the reference",
        ),
        (["--policies", "[{name: x, retain: {part: window, sink: many}}]"], "It takes int."),
        (["--policies", "[{name: x, retain: [window]}]"], "No retain part ['window']"),
        (
            ["--policies", "[{name: x, precision: {part: aged, age: -4}}]"],
            "age of 0 frames or more",
        ),
        (["--policies", "[top-attention@1MiB]"], "reading less frees none"),
        (["--policies", "[sliding-window@1KiB]"], "are 325632 bytes"),
        (["--backend", "flash"], "Backends here: sdpa, reference"),
        (["--reference", "none"], "No policy 'none'"),
        (["--budgets", "6f,many"], "'many' is not a budget"),
        (["--budgets", "6f,6f", "--policies", "[random]"], "One budget twice"),
        (["--budgets", "6f"], "meets no policy that it could be crossed with"),
        (["--budgets", "30f", "--policies", "[random]"], "must lie between 3f and 21f"),
        (["--videos", "-1"], "no number of prompts"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(words, text, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *SMALL, "--out", str(out), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert text in error
    assert "Traceback" not in error
    assert not out.exists()


def test_a_config_with_an_unknown_key_is_refused(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("prompts: 2\nframe: 24\n")
    with pytest.raises(SystemExit):
        main(["evaluate", "-c", str(path), "--out", str(tmp_path / "run")])
    assert "No setting 'frame'. Did you mean 'frames'?" in capsys.readouterr().err


def test_a_directory_of_another_run_is_refused(single, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit):
        main(["evaluate", *SMALL, "--seed", "1", "--out", str(out)])
    assert "seed" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("cut", [0, 100, 100_000])
def test_truncated_weights_are_refused(tmp_path, capsys, cut):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((WEIGHTS / "panorama.safetensors").read_bytes()[:cut])
    with pytest.raises(SystemExit):
        main(["evaluate", *SMALL, "--model", str(path), "--out", str(tmp_path / "run")])
    assert "cannot be read as safetensors" in capsys.readouterr().err


def test_foreign_weights_are_refused(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(SystemExit):
        main(["evaluate", *SMALL, "--model", str(path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "does not say how it is sampled" in error and f"self-forcing={path}" in error


def test_reports_of_a_finished_run(single, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    (out / "report.html").unlink()
    main(["report", str(out)])
    assert f"The report is {out / 'report.html'}" in capsys.readouterr().out
    assert "sliding-window@6f" in (out / "report.html").read_text()
    both = tmp_path / "both.html"
    main(["report", str(out), str(single[0]), "--out", str(both)])
    assert both.stat().st_size > (out / "report.html").stat().st_size
    main(["inspect", str(out)])
    text = capsys.readouterr().out
    assert "3 prompts cannot give 95 % confidence" in text and "sliding-window@6f" in text


def test_reports_of_an_interrupted_run(single, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    (records,) = (out / "records").iterdir()
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:4]) + lines[4][:50])
    for path in (out / "summary.json", out / "report.html"):
        path.unlink()
    for command in ("report", "inspect", "recommend"):
        main([command, str(out)])
    text = capsys.readouterr().out
    assert text.count("The run is not finished: 1 of 3 prompts.") == 2
    assert "The run is not finished: 1 of 3 prompts." in (out / "report.html").read_text()
    assert not (out / "summary.json").exists()


def test_a_recommendation_for_programs(single, capsys):
    words = ["--memory", "2MiB", "--margin", "recall=1,ssim=1", "--json"]
    main(["recommend", str(single[0]), *words])
    found = json.loads(capsys.readouterr().out)
    assert (found["memory"], found["margins"]) == (2 * 2**20, {"recall": 1, "ssim": 1})
    assert {one["policy"]: one["out"] for one in found["candidates"]} == {
        "sliding-window@6f": "unsure",  # three prompts are too few
        "random@6f": "unsure",
    }
    assert found["closest"] == "sliding-window@6f" and found["policy"] is None
    recall = summary(single[0])["policies"]["sliding-window@6f"]["metrics"]["recall"]["mean"]
    loss = found["candidates"][0]["losses"][0]
    assert loss["value"] == pytest.approx(recall) and loss["n"] == 3


def test_a_video_from_a_prompt(tmp_path, capsys):
    out = tmp_path / "a.mp4"
    words = ["--policy", "random@3f", "--seconds", "2", "--prompt", "night fast n7 left@1"]
    main(["generate", "dusk fast n7 left", *words, "-o", str(out)])
    text = capsys.readouterr().out
    assert out.is_file()
    for part in ("18 frames", "random@3f", "KV peak", "rows read", "comes at 0.75 s"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["recommend", "nowhere"], "No folder nowhere"),
        (["report", "nowhere"], "No folder nowhere"),
        (["inspect", "nowhere"], "No folder nowhere"),
        (["inspect", "."], "is no run directory"),
        (["report", "RUN", "RUN"], "is given twice"),
        (["report", "RUN", "."], "--out report.html"),
        (["report", "RUN", "--out", "RUN/run.json"], "does not end in .html"),
        (["report"], "required: RUN"),
        (["recommend", "RUN", "--memory", "24"], "Write 24GiB"),
        (["recommend", "RUN", "--margin", "recall"], "METRIC=NUMBER"),
        (["recommend", "RUN", "--margin", "recal=0.1"], "Did you mean 'recall'?"),
        (["recommend", "RUN", "--margin", "recall=-0.1"], "0 or more"),
        (["recommend", "RUN", "--margn", "recall=1"], "Did you mean 'margin'?"),
        (["generate", "a cat", "-o", "RUN/a.mp4"], "Try 'dusk fast n13 left'"),
        (["generate", "dusk fast n7 left"], "required: -o/--out"),
        (["generate", "dusk fast n7 left", "-o", "RUN/a.gif"], "does not end so"),
        (["generate", "dusk fast n7 left", "-o", "RUN/a.mp4", "--seconds", "x"], "--seconds"),
        (["generate", "dusk fast n7 left", "-o", "RUN/a.mp4", "--secs", "1"], "'seconds'?"),
        (["list"], "required: WHAT"),
    ],
)
def test_bad_input_of_the_other_commands(single, words, text, capsys):
    before = sorted(single[0].rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([word.replace("RUN", str(single[0])) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert text in error and error.startswith("error: ")
    assert before == sorted(single[0].rglob("*"))


def test_a_run_without_records_is_said(single, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    shutil.rmtree(out / "records")
    for command in ("report", "inspect", "recommend"):
        with pytest.raises(SystemExit):
            main([command, str(out)])
        assert "has no records: nothing of this run is measured" in capsys.readouterr().err


def test_an_unknown_list_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["list", "polices"])
    assert "Did you mean 'policies'?" in capsys.readouterr().err


def test_an_unknown_command_is_said(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evalute"])
    assert stop.value.code == 2
    assert "Did you mean 'evaluate'?" in capsys.readouterr().err


def test_help_names_the_commands_in_order(capsys):
    main([])
    text = capsys.readouterr().out
    found = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2:3]]
    assert [word for word in found if word in COMMANDS] == list(COMMANDS)


def test_help_does_not_wait_for_heavy_imports():
    code = (
        "import sys; from lightning_kv.cli import main\n"
        f"for command in {list(COMMANDS)}:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'torchmetrics', 'scipy', 'matplotlib', 'av', 'jinja2'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code]).stderr.strip() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_a_half_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 60
    assert f"lightning-kv {command}" in text.partition("example")[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_parses_and_explains_its_keys(path):
    command, kind = {
        "pretrain_panorama": ("pretrain", PretrainOptions),
        "pretrain_encoder": ("pretrain-encoder", PretrainEncoderOptions),
        "calibrate": ("calibrate", CalibrateOptions),
        "distill": ("distill", DistillOptions),
    }.get(path.stem, ("evaluate", EvaluateOptions))
    options = parse(command, ["-c", str(path)])
    assert isinstance(options, kind)
    for line in path.read_text().splitlines():
        if line and not line.startswith((" ", "#")) and not line.endswith(":"):
            assert "#" in line or "policies" in line, f"no comment: {line}"
    assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("what", ["policies", "parts", "models", "metrics"])
def test_lists(what, capsys):
    main(["list", what, "--json"])
    rows = json.loads(capsys.readouterr().out)
    main(["list", what])
    text = capsys.readouterr().out
    assert all(str(next(iter(row.values()))) in text for row in rows)
    if what == "models":
        found = {row["model"]: row for row in rows}
        assert "1,418,996,800 parameters, 5.31 GiB" in found["self-forcing"]["size"]
        assert found["self-forcing"]["type"] == "lightning-kv fetch self-forcing"
        assert found["panorama"]["size"] == "893,008 parameters"
