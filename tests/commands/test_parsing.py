"""What can be typed: one grammar for all commands; help, errors, exit codes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from lightning_kv import __version__
from lightning_kv.cli import COMMANDS as COMMANDS_KNOWN
from lightning_kv.cli import command, main, parse
from lightning_kv.commands.evaluate import DataOptions
from lightning_kv.commands.options import options_of, shown
from lightning_kv.commands.parsing import as_list
from lightning_kv.tasks.options import TrainerOptions, TrainingTrainerOptions

ON_CPU = TrainingTrainerOptions("cpu")
WARNS = TrainerOptions(deterministic="warn")
NAMED = {"name": "x", "retain": "y"}
SWITCHES = ("a, b@2", "c@3")
STAGE = ["--recipe.stages", "[{steps: 1, chunks: 1, batch: 1, sizes: [4, 6], lr: 0.1}]"]

COMMANDS = {
    "compare": ("--out", "--pairs", "--metrics", "--unpaired", "--length", "--resize", "--strict"),
    "check": ("RUN", "--baseline", "--margin", "--policies", "--level", "--json"),
}


def run(capsys, *words):
    """Exit code, output and error of a command."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    code, text, _ = run(capsys, command, "--help")
    assert code == 0 and all(word in text for word in COMMANDS[command])
    assert f"lightning-kv {command}" in text.partition("examples:")[2]
    assert "exit code" in re.sub(r"\s+", " ", text).lower()
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) <= 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "RUN"], "required: --baseline"),
        (["check"], "required: RUN, --baseline"),
        (["check", "RUN", "--baseline", "RUN", "--levle", "0.9"], "Did you mean 'level'?"),
        (
            ["check", "RUN", "--baseline", "RUN", "--level", "much"],
            "It takes a number",
        ),
        (["check", "RUN", "--baseline", "RUN", "--level", "95"], "level of 95"),
        (["check", "RUN", "--baseline", "RUN", "--margin", "psnr:1"], "METRIC=NUMBER"),
        (["check", "RUN", "--baseline", "RUN", "--margin", "psnr=1,psnr=2"], "twice"),
        (["check", "RUN", "--baseline", "nowhere"], "nowhere is no summary"),
        (["compare", "RUN", "RUN"], "required: -o/--out"),
        (["compare", "--out", "new"], "Nothing to compare: given 0 folders"),
        (["compare", "RUN", "nowhere", "--out", "new"], "There is no such folder of videos"),
        (
            ["compare", "RUN", "x", "--out", "new", "--videos", "few"],
            "It takes a whole number",
        ),
        (["compare", "RUN", "x", "--out", "new", "--length", "longest"], "'equal', 'shortest'"),
        (["compare", "RUN", "x", "--out", "new", "--unpared"], "Did you mean 'unpaired'?"),
    ],
)
def test_errors_are_said_and_nothing_is_written(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    metric = {"recipe": "r", "higher_is_better": True, "against_reference": False, "status": "ok"}
    policy = {"metrics": {"recall": metric}, "units": {f"k{i}": {"recall": 0.5} for i in range(5)}}
    summary = {"reference": "full", "policies": {"full": policy}}
    (folder / "summary.json").write_text(json.dumps(summary))
    code, text, error = run(capsys, *(word.replace("RUN", "run") for word in words))
    assert code == 2 and text == ""
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()
    code, text, _ = run(capsys, "check", "run", "--baseline", "run/summary.json")
    assert code == 0 and text.startswith("PASS")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[a,{b: 1, c: [d, e]}]", ["a", {"b": 1, "c": ["d", "e"]}]),
        (" {b: 1}, a", [{"b": 1}, "a"]),
        ("a, b", ["a", "b"]),
    ],
)
def test_lists(text, names):
    assert as_list(text) == names


@pytest.mark.parametrize(
    "text", ["[a", "a]", "[{a: 1]", "{a: 1", "[{a: b: c}]", "[{a: 1}", "{a: 1}]"]
)
def test_a_list_that_is_not_closed(text):
    with pytest.raises(ValueError, match=r"The list .*Write"):
        as_list(text)


def options(command, *words):
    return parse(command, words)


@pytest.mark.parametrize(
    ("command", "field", "words", "value"),
    [
        ("evaluate", "policies", ["--policies", "a,b"], ["a", "b"]),
        ("evaluate", "policies", ["--policies=[a, b]"], ["a", "b"]),
        ("evaluate", "policies", ["--policies", "a,{name: x, retain: y}"], ["a", NAMED]),
        ("evaluate", "policies", ["--policies", "a", "--policies", "b"], ["b"]),
        ("evaluate", "policies", ["--policies", "[a]", "--policies+", "b,c"], ["a", "b", "c"]),
        ("evaluate", "budgets", ["--budgets", "6f,0.25"], ["6f", "0.25"]),
        ("evaluate", "budgets", ["--budgets", "[6f,0.25]"], ["6f", 0.25]),
        ("evaluate", "metrics", ["--metrics", "psnr,fvd/i3d"], ["psnr", "fvd/i3d"]),
        ("evaluate", "negative", ["--negative", "-blurred, dark"], "-blurred, dark"),
        ("evaluate", "videos", ["--videos", "-1"], -1),
        ("evaluate", "out", ["-o", "x"], Path("x")),
        ("evaluate", "out", ["-ox"], Path("x")),
        ("evaluate", "latents", ["--latents"], True),
        ("evaluate", "decode", ["--decode", "False"], False),
        ("evaluate", "trainer", ["--trainer.deterministic"], TrainerOptions(deterministic=True)),
        ("evaluate", "trainer", ["--trainer.deterministic", "warn"], WARNS),
        ("check", "policies", ["r", "--baseline", "b", "--policies", "[a,b]"], ["a", "b"]),
        ("check", "json", ["--baseline", "b", "--json", "r"], True),
        ("compare", "folders", ["a", "-o", "x", "b", "c"], tuple(map(Path, "abc"))),
        ("compare", "metrics", ["a", "b", "-o", "x", "--metrics", "psnr,ssim"], ("psnr", "ssim")),
        ("generate", "switches", ["p", "-o", "x", "--prompt", "a, b@2", "--prompt=c@3"], SWITCHES),
        ("generate", "prompt", ["-o", "x", "--", "--dusk"], "--dusk"),
        ("report", "runs", ["a", "b"], [Path("a"), Path("b")]),
        ("pretrain", "trainer", [*STAGE, "--trainer.accelerator", "cpu"], ON_CPU),
        ("pretrain", "trainer", [*STAGE, "--accelerator", "cpu"], ON_CPU),
        ("pretrain-encoder", "trainer", ["--accelerator", "cpu"], ON_CPU),
        ("generate", "accelerator", ["p", "-o", "x", "--trainer.accelerator", "cpu"], "cpu"),
    ],
)
def test_what_is_typed_is_what_is_meant(command, field, words, value):
    assert getattr(options(command, *words), field) == value


@pytest.mark.parametrize(
    ("command", "usual"),
    [
        ("evaluate", []),
        ("compare", ["a", "b", "-o", "x"]),
        ("fetch", ["name"]),
    ],
)
def test_licences_are_accepted_alike_everywhere(command, usual):
    for name in ("--accept_license", "--accept-license"):
        for words in ([name, "a,b"], [name, "[a,b]"], [name, "a", f"{name}=b"]):
            assert list(options(command, *usual, *words).accept_license) == ["a", "b"]


@pytest.mark.parametrize(("command", "usual"), [("evaluate", []), ("compare", ["-o", "x"])])
def test_devices_are_chosen_alike_everywhere(command, usual):
    for names in (("--devices", "--accelerator"), ("--trainer.devices", "--trainer.accelerator")):
        own = options(command, *usual, names[0], "0,2", names[1], "cpu").trainer
        assert (own.devices, own.accelerator) == ("0,2", "cpu")
    assert options(command, *usual, "--devices", "2").trainer.devices == 2


FLAGS = [
    ("report", ["r"], "force"),
    ("convert", ["s", "-o", "x", "--to", "original"], "force"),
    ("decode", ["s"], "force"),
    ("encode", ["p"], "force"),
    ("export", ["r", "-o", "x"], "force"),
    ("fetch", ["n"], "force"),
    ("generate", ["p", "-o", "x"], "force"),
    ("shards", ["make", "p"], "force"),
    ("compare", ["a", "b", "-o", "x"], "strict"),
    ("check", ["r", "--baseline", "b"], "json"),
    ("recommend", ["r"], "json"),
    ("doctor", [], "json"),
    ("list", ["policies"], "json"),
    ("evaluate", [], "latents"),
]


@pytest.mark.parametrize(("command", "usual", "name"), FLAGS, ids=lambda x: str(x))
def test_a_flag_stands_alone_or_says_true_or_false(command, usual, name):
    for words, value in (
        ([], False),
        ([f"--{name}"], True),
        ([f"--{name}", "true"], True),
        ([f"--{name}=true"], True),
        ([f"--{name}", "false"], False),
    ):
        assert getattr(options(command, *words, *usual), name) is value
        assert getattr(options(command, *usual, *words), name) is value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--see", "1"], "No setting 'see'. Did you mean 'seed'?"),
        (["evaluate", "--trainer.device", "1"], "Did you mean 'trainer.devices'?"),
        (["evaluate", "--trainer.max_epoch", "3"], "'trainer.max_epochs'? It is refused: nothing"),
        (["pretrain", "--max_epoch", "3"], "Did you mean 'trainer.max_epochs'? It is refused:"),
        (["evaluate", "--trainer", "bogus"], "--trainer alone is no option: it has options of its"),
        (["pretrain-encoder", "--recipe=x"], "They are seed, steps"),
        (["evaluate", "--context-frame", "1"], "Did you mean 'context_frames'?"),
        (["evaluate", "--zzz", "1"], "No setting 'zzz'. `lightning-kv evaluate --help`"),
        (["evaluate", "-z"], "No setting 'z'."),
        (["evaluate", "stray"], "has no place for the word 'stray'"),
        (["evaluate", "--out"], "--out needs a value, and has none."),
        (["generate", "--out", "--force", "p"], "The next word is '--force'"),
        (["evaluate", "--seed", "1.5"], "--seed 1.5 does not fit. It takes a whole number."),
        (["evaluate", "--latents=maybe"], "--latents maybe does not fit. It takes true or false"),
        (["evaluate", "-c", "wrong.yaml"], "No setting 'polices'. Did you mean 'policies'?"),
        (["evaluate", "-c", "inside.yaml"], "No setting 'data.shard'. Did you mean 'data.shards'?"),
        (["evaluate", "-c", "trainer.yaml"], "--trainer.max_epochs is refused: nothing is"),
        (["evaluate", "-c", "three.yaml"], "--data 3 does not fit: it has options of its own."),
        (["evaluate", "-c", "none.yaml"], "--data None does not fit"),
        (["evaluate", "-c", "class.yaml"], "--trainer 'a.b:C' does not fit"),
        (["pretrain", "-c", "recipe.yaml"], "--recipe 'long' does not fit"),
        (["evaluate", "-c", "no.yaml"], "is no settings file that can be read"),
        (["evaluate", "-c", "torn.yaml"], "The file of -c is no YAML."),
        (["evaluate", "-c", "bytes.yaml"], "The settings file of -c cannot be read"),
        (["evaluate", "-c", "."], "Give -c a YAML file"),
        (["pretrain", "-c", "stage.yaml"], "No setting 'step' in recipe.stages. Did you mean"),
        (["pretrain"], "required: --recipe.stages"),
        (["help", "evalute"], "Did you mean 'evaluate'?"),
    ],
)
def test_what_cannot_be_meant_is_said(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "wrong.yaml": "polices: [full]",
        "inside.yaml": "data: {shard: x}",
        "trainer.yaml": "trainer: {max_epochs: 3}",
        "three.yaml": "data: 3",
        "none.yaml": "data:\nseed: 3",
        "class.yaml": "trainer: a.b:C",
        "recipe.yaml": "recipe: long",
        "torn.yaml": "policies: [full",
        "stage.yaml": "recipe: {stages: [{step: 3}]}",
    }.items():
        Path(name).write_text(content)
    Path("bytes.yaml").write_bytes(b"policies: [\xff\xfe]")
    before = sorted(tmp_path.iterdir())
    code, text, error = run(capsys, *words)
    assert code == 2 and text == "" and error.startswith("error: ") and error.count("\n") == 1
    assert said in error and "Traceback" not in error and "Settings:" not in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", COMMANDS_KNOWN)
def test_every_default_stands_in_help(name, capsys):
    code, text, _ = run(capsys, name, "--help")
    assert code == 0 and max(map(len, text.splitlines())) <= 100
    assert text == run(capsys, "help", name)[1] == run(capsys, name, "-h")[1]
    told = re.sub(r"\s+", " ", text)
    for one in options_of(command(name)):
        about = one.help.replace("%%", "%")
        assert about.removesuffix(".") and f" {about} " in f"{told} "
        if not one.typed:  # a word without a name
            continue
        assert f"--{one.typed}" in text and about.endswith(").")
        if one.default not in (None, dataclasses.MISSING):
            assert about.endswith(f"({shown(one.default)}).")


def test_help_and_version(capsys):
    texts = {run(capsys, *words)[1] for words in ([], ["--help"], ["-h"], ["help"])}
    assert len(texts) == 1 and "lightning-kv help COMMAND" in texts.pop()
    assert run(capsys, "--version") == (0, f"lightning-kv {__version__}\n", "")


def test_a_data_module_is_named_alone_or_with_its_arguments(tmp_path):
    path = tmp_path / "a.yaml"
    for text in ("data: a.b:C", "data: {class_path: 'a.b:C'}", "data:\n  class_path: a.b:C"):
        path.write_text(f"{text}\nseed: 3\n")
        words = ["-c", str(path), "--data.init_args.first", "4", "--data.seed", "5"]
        found = options("evaluate", *words)
        assert found.data == DataOptions(None, 5, "a.b:C", {"first": 4}) and found.seed == 3
        assert options("evaluate", "-c", str(path)).data == DataOptions(class_path="a.b:C")
        found = options("evaluate", "-c", str(path), "--data", "x.y:Z")
        assert found.data.class_path == "x.y:Z"


def test_settings_of_a_file_may_use_the_same_words(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("policies: full,random\nmetrics: psnr\ntrainer: {callbacks: 'a:B'}\n")
    found = options("evaluate", "-c", str(path), "--seed", "3")
    assert found.policies == ["full", "random"] and found.metrics == ["psnr"]
    assert found.trainer.callbacks == ["a:B"] and found.seed == 3
    path.write_text("trainer: {callbacks: {class_path: a.B, init_args: {c: 1}}}\n")
    own = options("evaluate", "-c", str(path)).trainer.callbacks
    assert own == [{"class_path": "a.B", "init_args": {"c": 1}}]
