"""``table.tex``: balanced, escaped, and with the numbers of the summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.report.latex import escape, number, write_latex

RECALL = {"full": [1.0] * 3, "top_attention@50%": [0.25, 0.5, 0.75], "w@6f": [0.5, 0.625, 1.0]}


@pytest.fixture
def text(tmp_path: Path, make_run, add_statistics, add_metrics) -> str:
    run = make_run(tmp_path / "my run", RECALL, ["a", "b", "c"])
    write_latex(tmp_path / "table.tex", [add_metrics(add_statistics(run))])
    return (tmp_path / "table.tex").read_text()


def tabulars(text: str) -> list[list[list[str]]]:
    """Cells of every tabular, after a check of what LaTeX would stumble over."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    plain = re.sub(r"\\[&%$#_{}]", "", code)
    assert not re.search(r"[%#~](?!\$)", plain.replace("~$", "").replace(r"~\mathrm", ""))
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert all("_" not in part for part in plain.split("$")[::2]), "no index outside of math"
    assert all("^" not in part for part in plain.split("$")[::2])
    assert not re.search(r"\^\{[^}]*\}\^", plain), "no double superscript"
    assert code.isascii()
    found = []
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{(lr*)\}\n(.*?)\\end\{tabular\}", code, re.S
    ):
        rules = re.findall(r"\\(?:top|mid|bottom)rule", body)
        assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
        lines = [line for line in body.splitlines() if not line.endswith("rule")]
        assert all(line.endswith(r" \\") for line in lines)
        rows = [re.split(r"(?<!\\) & ", line[:-3]) for line in lines]
        assert {len(row) for row in rows} == {len(columns)}
        found.append(rows)
    assert len(found) == code.count(r"\begin{tabular}") == code.count(r"\end{tabular}")
    return found


def test_the_numbers_are_there_and_the_best_is_bold(text: str) -> None:
    first, *more = tabulars(text)
    assert first[0][:2] == ["policy", r"recall~$\uparrow$"]
    assert first[1][1:3] == ["(share)", "(dB)"]
    rows = {row[0]: row for row in first[2:]}
    assert list(rows) == ["full (reference)", r"top\_attention@50\%", "w@6f"]
    assert rows[r"top\_attention@50\%"][1] == r"$0.500 \pm 0.250$\textsuperscript{*}"
    assert rows["w@6f"][1] == r"$\mathbf{0.708} \pm 0.292$\textsuperscript{*}"
    assert rows["full (reference)"][1] == r"$1.000 \pm 0$"
    assert rows["full (reference)"][2] == "--"
    assert rows["w@6f"][3] == r"$122.5$ (null 88.2)"
    assert rows["full (reference)"][4] == r"$4.77~\mathrm{MiB}$"
    assert rows["w@6f"][5] == r"$25.0\,\%$"
    heads = [cell for table in more for cell in table[0]]
    assert all(rf"quality {i}~$\uparrow$" in heads for i in range(16))
    assert "brightness" in heads, "neither way is better: no arrow"


def test_comments_name_the_run_the_reference_and_the_recipes(text: str) -> None:
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert comments[0].startswith("% Run my run: panorama, 3 prompts, 12 frames, reference full")
    assert "% recall (n = 3): share of columns that come back" in comments
    sides = "96 windows of 48 prompts against the real set (64 windows of 32 clips)"
    assert f"% fvd/panorama-encoder ({sides}): how" in comments
    assert any("booktabs" in line for line in comments)
    assert any("Holm" in line for line in comments)


def test_several_runs_stand_in_one_table(tmp_path: Path, make_run) -> None:
    runs = [make_run(tmp_path / name, {"full": [1.0], name: [0.5]}, ["p"]) for name in "ab"]
    write_latex(tmp_path / "table.tex", runs)
    (first, *_) = tabulars((tmp_path / "table.tex").read_text())
    names = ["a/full (reference)", "a", "b/full (reference)", "b"]
    assert [row[0] for row in first[2:]] == names


@given(st.text(st.characters(max_codepoint=126)))
def test_nothing_special_is_left(text: str) -> None:
    left = re.sub(r"\\(?:text[a-z]+\{\}|[&%$#_{}])", "", escape(text))
    assert not set(left) & set("&%$#_{}~^\\\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("3.1e-5", r"3.1 \times 10^{-5}"),
        ("2.5e5", r"2.5 \times 10^{5}"),
        ("878 KiB", r"878~\mathrm{KiB}"),
        ("12 B", r"12~\mathrm{B}"),
        ("26.1 %", r"26.1\,\%"),
        ("0.5", "0.5"),
        ("1.06x", r"1.06\times"),
    ],
)
def test_numbers_in_math(text: str, shown: str) -> None:
    assert number(text) == shown
