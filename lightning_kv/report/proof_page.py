"""A page about budgets by head on held-out prompts: verdicts, and a table for each comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_kv.report.markdown import escaped, table
from lightning_kv.report.page import templates
from lightning_kv.utilities.files import write_atomic
from lightning_kv.utilities.formatting import number


@dataclass(frozen=True)
class Section:
    """One comparison.

    Args:
        title: What is compared.
        sentences: The verdict and what it rests on.
        heads: Of the columns of the table.
        rows: Cells of each row.
    """

    title: str
    sentences: tuple[str, ...]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def ranged(
    value: float, low: float | None, high: float | None, shown: Callable[[float], str] = number
) -> str:
    """A value and its interval, if it has one, as a cell.

    >>> ranged(0.5, 0.25, 0.75), ranged(0.5, None, None)
    ('0.5 [0.25, 0.75]', '0.5')
    """
    return shown(value) + ("" if low is None else f" [{shown(low)}, {shown(high)}]")


def write_proof_page(
    path: Path, title: str, sentences: Sequence[str], sections: Sequence[Section], command: str
) -> None:
    """Write it as one self-contained HTML file, or as markdown.

    Args:
        path: File to write, ``.html`` or ``.md``.
        title: Its heading.
        sentences: What holds for all comparisons.
        sections: The comparisons.
        command: What writes the page again.
    """
    if path.suffix == ".md":
        write_atomic(path, as_markdown(title, sentences, sections, command))
        return
    text = (
        templates()
        .get_template("proof.html.j2")
        .render(title=title, sentences=sentences, sections=sections, command=command)
    )
    write_atomic(path, text)


def as_markdown(
    title: str, sentences: Sequence[str], sections: Sequence[Section], command: str
) -> str:
    """The page as GitHub markdown."""
    parts = [f"# {escaped(title)}", *map(escaped, sentences)]
    for own in sections:
        said = "\n".join(f"- {escaped(sentence)}" for sentence in own.sentences)
        parts += [f"## {escaped(own.title)}", said, table(own.heads, own.rows)]
    return "\n\n".join([*parts, f"Written by `{command}`."]) + "\n"
