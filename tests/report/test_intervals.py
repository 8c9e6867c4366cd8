"""Few prompts: every table that shows an interval says what it is worth, in the same words."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lightning_kv.report.latex import write_latex
from lightning_kv.report.markdown import write_markdown
from lightning_kv.report.page import write_page
from lightning_kv.report.table import render_tables

RECALL = [0.25, 0.5, 0.75, 0.3, 0.6, 0.9]


def shown(tmp_path: Path, run) -> dict[str, str]:
    """What every kind of report says, in one line each."""
    console = Console(file=io.StringIO(), width=120)
    console.print(render_tables(run.summary))
    write_markdown(tmp_path / "report.md", [run], [])
    write_latex(tmp_path / "table.tex", [run])
    write_page(tmp_path / "report.html", [run], [])
    texts = {name: (tmp_path / name).read_text() for name in ("report.md", "table.tex")}
    texts["report.html"] = (tmp_path / "report.html").read_text()
    texts["terminal"] = console.file.getvalue()
    return {name: re.sub(r"\s+", " ", text) for name, text in texts.items()}


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(("prompts", "limit"), [(2, "50 %"), (3, "75 %"), (4, "88 %"), (6, None)])
def test_every_report_says_what_intervals_of_few_prompts_are(tmp_path, make_run, prompts, limit):
    recall = {"full": [1.0] * prompts, "w@3f": RECALL[:prompts]}
    run = make_run(tmp_path / "run", recall, ["a cat"] * prompts)
    for name, text in shown(tmp_path, run).items():
        said = text.count("hold the true mean less often than in 95 % of all cases")
        assert said == (1 if limit else 0), name
        if limit:
            assert f"at most {limit} with {prompts} prompts." in text, name
