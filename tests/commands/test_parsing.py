"""The commands around measurements: help, errors, exit codes."""

import json
import re

import pytest

from lightning_kv.cli import main
from lightning_kv.commands.parsing import as_list

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
        (["compare", "--out", "new"], "Nothing to compare: 0 folder"),
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
        ("[a,b]", ["a", "b"]),
        ("a, b", ["a", "b"]),
        (" [fvd/i3d=some/file] ", ["fvd/i3d=some/file"]),
        ("[]", []),
        ("[a,,b,]", ["a", "b"]),
    ],
)
def test_lists(text, names):
    assert as_list(text) == names
