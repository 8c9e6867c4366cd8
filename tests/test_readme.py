"""What the README says can be typed, and it works."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_kv.cli import main, parse
from lightning_kv.tasks.rollouts.policies import chosen_policies

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line.split("   #")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.strip()
]
TOUR = [line for line in COMMANDS if "tiny-wan" in line]
MEASURES = [line for line in COMMANDS if "tour/" in line]
OWN = [line for line in COMMANDS if "mine.thinned" in line]
TEACHING = [
    line for line in COMMANDS if line.split()[1:3] in (["distill", "-c"], ["prove", "scorer"])
]
FITTING = [
    line
    for line in COMMANDS
    if line.split()[1] in ("calibrate", "budgets", "prove") and line not in TEACHING
]
COMMANDS = [line for line in COMMANDS if line not in (*TOUR, *MEASURES, *OWN, *FITTING, *TEACHING)]
PYTHON = [block for kind, block in BLOCKS if kind == "python" and "mine" not in block]
UNDER_LIGHTNING = [code for code in PYTHON if "lightning_kv.tasks" in code]
OWN_FILE, OWN_PYTHON = (block for kind, block in BLOCKS if kind == "python" and "mine" in block)
SMALLER = ["--prompts", "1", "--frames", "27", "--videos", "0", "--trainer.devices", "1"]
SMALLEST = [*SMALLER, "--frames", "18", "--metrics", "[recall,psnr]"]
READERS = ("recommend", "report", "inspect")


def test_there_is_something_to_test():
    assert len(COMMANDS) > 12
    assert PYTHON and OWN and len(UNDER_LIGHTNING) >= 2


@pytest.fixture
def example_folder(tmp_path, monkeypatch):
    """What a reader has around an example."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(UNDER_LIGHTNING)))
def test_python_under_lightning_runs(number, example_folder, capsys):
    path = example_folder / "example.py"
    path.write_text(UNDER_LIGHTNING[number])
    with torch.random.fork_rng():
        runpy.run_path(str(path))
    assert capsys.readouterr().out


@pytest.mark.slow
def test_python_runs(example_folder):
    """One example after the other, in a process that has no Lightning."""
    examples = [code for code in PYTHON if code not in UNDER_LIGHTNING]
    assert len(examples) >= 2
    paths = [example_folder / f"example{number}.py" for number in range(len(examples))]
    for path, code in zip(paths, examples, strict=True):
        path.write_text(code)
    code = "import sys, runpy\nsys.modules['lightning'] = None\n"
    code += "for path in sys.argv[1:]: print('==', path, flush=True); runpy.run_path(path)"
    words = [sys.executable, "-c", code, *map(str, paths)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr
    shown = re.split(r"^== .*\n", found.stdout, flags=re.MULTILINE)[1:]
    assert len(shown) == len(examples) and all(shown)


@pytest.mark.slow
def test_a_policy_of_ones_own_from_a_folder_of_ones_own(tmp_path, monkeypatch, capsys):
    """Exactly the file that is shown, outside the package; the commands and Python beside it."""
    assert OWN_FILE.startswith("# mine/thinned.py\n")
    assert len(OWN_FILE.splitlines()) <= 40
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thinned.py").write_text(OWN_FILE)
    for shared in ("configs", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    console = str(
        Path(sys.executable).parent / "lightning-kv"
    )  # does not search this folder itself
    first, *others = OWN
    found = subprocess.run(
        [console, *shlex.split(first)[1:], *SMALLER],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, found.stderr
    summary = json.loads((tmp_path / "runs" / "thinned" / "summary.json").read_text())
    assert list(summary["policies"]) == ["full", "mine.thinned:Thinned@9f", "sliding-window@9f"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for line in others:
            main([*shlex.split(line)[1:], *SMALLER])
        capsys.readouterr()
        exec(OWN_PYTHON, {})
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]
    assert "Thinned(budget=Uniform(amount='6f')" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if line.startswith("lightning-kv evaluate")]
)
@pytest.mark.thinned(20)
def test_evaluate_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    asked = parse("evaluate", words[1:])
    policies, _ = chosen_policies(asked.policies, asked.reference, asked.budgets)
    smaller = SMALLER if len(policies) <= 5 else SMALLEST
    main([*words, *smaller, "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(policies) <= set(summary["policies"])


@pytest.mark.slow
def test_the_tour_of_budgets_by_head_runs(tmp_path, monkeypatch, capsys):
    """In its order, on few worlds and one chunk of each."""
    for shared in ("configs", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    monkeypatch.chdir(tmp_path)
    few = ["--frames", "33", "--chunks", "1"]
    more = {
        "calibrate": [*few, "--prompts", "3", "--validate", "0", "--scorers", "mass,heavy-hitters"],
        "budgets": ["--resamples", "20"],
        "prove": [*few, "--prompts", "8", "--context_frames", "15", "--means", "6f"],
    }
    for line in FITTING:
        command, *words = shlex.split(line)[1:]
        words = [word if word != "2" else "1" for word in words]  # processes
        main([command, *words, *more[command]])
    text = capsys.readouterr().out
    assert [line.split()[1] for line in FITTING] == ["calibrate", "budgets", "prove"]
    assert "frames of heads" in text and "8 held-out prompts" in text


@pytest.mark.slow
def test_the_tour_of_a_scorer_runs(tmp_path, monkeypatch, capsys):
    """In its order, on few worlds and short clips."""
    for shared in ("configs", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    monkeypatch.chdir(tmp_path)
    short = ["--frames", "36"]
    few = [
        "--prompts",
        "6",
        "--validate",
        "2",
        "--rounds",
        "1",
        "--recipe",
        "{steps: 30, looks: 3}",
    ]
    more = {"distill": [*short, *few], "prove": [*short, "--prompts", "9", "--means", "6f"]}
    for line in TEACHING:
        command, *words = shlex.split(line)[1:]
        words = [word if word != "2" else "1" for word in words]  # processes
        main([command, *words, *more[command]])
    text = capsys.readouterr().out
    assert [line.split()[1] for line in TEACHING] == ["distill", "prove"]
    assert "taught on 4 prompts in 2 rounds" in text and "9 held-out prompts" in text


@pytest.mark.slow
def test_the_measuring_tour_runs(tmp_path, monkeypatch, capsys):
    """On five prompts and three policies; a run checked against itself passes."""
    monkeypatch.chdir(tmp_path)
    few = ["--prompts", "5", "--frames", "21", "--videos", "1", "--trainer.devices", "1"]
    few += ["--policies", "[full,sliding-window@9f,top-attention@9f]"]
    shards = ["--data.shards", str(ROOT / "data/panorama-quick")]
    done = []
    for line in MEASURES:
        words = [w.replace("configs/", f"{ROOT}/configs/") for w in shlex.split(line)[1:]]
        done.append(words[0])
        if words[0] == "check":
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 0
            continue
        more = shards if "--context_videos" not in words else []
        main([*words, *few, *more] if words[0] == "evaluate" else words)
    assert done == ["evaluate", "check", "export", "compare", "shards", "evaluate"]
    went_on = json.loads((tmp_path / "tour/went_on/summary.json").read_text())
    assert went_on["policies"]["full"]["metrics"]["recall"]["mean"] > 0.95
    text = capsys.readouterr().out
    assert "PASS" in text and "lightning-kv fetch alexnet" in text
    found = json.loads((tmp_path / "tour/compared/summary.json").read_text())
    assert list(found["policies"]) == ["full", "sliding-window@9f", "top-attention@9f"]
    distance = found["policies"]["sliding-window@9f"]["metrics"]["fvd/panorama-encoder"]
    assert distance["mean"] is not None and distance["n"] > 0
    assert len(list((tmp_path / "tour/vbench/full").glob("*.mp4"))) == 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    config = ["-c", str(ROOT / "configs/quickstart.yaml"), "--videos", "0", "--out", str(path)]
    shards = ["--data.shards", str(ROOT / "data/panorama-quick"), "--trainer.devices", "1"]
    smaller = ["--prompts", "5", "--frames", "21", "--policies", "[sliding-window@6f,random@9f]"]
    with pytest.MonkeyPatch.context() as patch:  # `report` makes its page
        patch.setattr("lightning_kv.tasks.report.write_report", lambda *_: None)
        main(["evaluate", *config, *shards, *smaller])
    return path


@pytest.mark.parametrize(
    "line", [c for c in COMMANDS if c.split()[1:2] and c.split()[1] in READERS]
)
@pytest.mark.thinned(2)
def test_commands_on_runs_run(line, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copies = iter(range(9))
    words = []
    for word in shlex.split(line)[1:]:
        if word.startswith("runs/"):
            word = str(shutil.copytree(run, tmp_path / f"run{next(copies)}"))
        words.append(word)
    main(words)
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("lightning-kv generate")])
def test_generate_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(shlex.split(line)[1:])
    assert list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("lightning-kv list")])
def test_list_commands_run(line, capsys):
    main(shlex.split(line)[1:])
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        c
        for c in COMMANDS
        if c.split()[0] != "lightning-kv"
        or c.split()[1] not in ("evaluate", "list", "generate", *READERS)
    ],
)
def test_other_commands_name_what_is_there(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[:2] == ["lightning-kv", "pretrain"]:
        options = parse("pretrain", words[2:])
        assert options.recipe.steps > 1000
        return
    if "-c" in words:  # launchers: test_cli runs them
        assert words[0] in ("python", "fabric", "torchrun")
        parse("evaluate", words[words.index("-c") :][:2])
    for word in words:
        if word.startswith(("tools/", "configs/")):
            assert (ROOT / word).is_file()


FEWER = {
    "evaluate": ["--prompts", "1"],
    "generate": ["--seconds", "3"],
    "tools/bench_rollout.py": ["--chunks", "7", "--repeats", "1"],
}


@pytest.mark.slow
def test_the_tour_of_a_real_model_runs(tmp_path, monkeypatch, capsys):
    """In the order of the README, in a folder with nothing but the project's own files; one prompt,
    and a shorter clip and benchmark."""
    pytest.importorskip("diffusers", reason="the extra [wan] is not installed")
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert len(TOUR) > 5
    for line in TOUR:
        kind, *words = shlex.split(line)
        words += FEWER.get(words[0], [])
        if kind == "lightning-kv":
            main(words)
            continue
        assert kind == "python"
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        assert not code, line
    assert len(list((tmp_path / "tiny-wan" / "videos").rglob("*.mp4"))) == 5
    assert json.loads((tmp_path / "tiny-wan" / "bench.json").read_text())
    summary = json.loads((tmp_path / "tiny-wan" / "run" / "summary.json").read_text())
    assert len(summary["policies"]) == 5


def test_tables_of_the_package_are_up_to_date():
    sys.path.insert(0, str(ROOT / "tools"))
    from readme_tables import policy_table

    assert policy_table() in TEXT


def test_no_table_is_empty():
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", TEXT, flags=re.DOTALL)
    assert len(tables) == 9
    assert all(table.count("\n|") >= 5 for _, table in tables)
