"""A pytest plug-in: the option ``--policy``, and what the conformance suite has tried and refused.

It is installed with the package; where it is not, ``-p lightning_kv.testing.plugin`` loads it.
"""

from __future__ import annotations

import pytest

CELL = "test_conformance.py::test_cell["


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which policies the conformance suite is about."""
    parser.getgroup("lightning_kv").addoption(
        "--policy",
        action="append",
        metavar="POLICY",
        help="hold this policy against the conformance suite (pytest --pyargs "
        "lightning_kv.testing): a preset, NAME@BUDGET, package.module:Class or a YAML file; may be "
        "given several times; all presets where it is not given",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Cells, seconds, and every refusal with its reason."""
    found = {
        outcome: [r for r in terminalreporter.stats.get(outcome, []) if CELL in r.nodeid]
        for outcome in ("passed", "failed", "skipped")
    }
    every = [report for own in found.values() for report in own]
    if not every:
        return
    seconds = sum(report.duration for report in every)
    counts = ", ".join(f"{len(own)} {name}" for name, own in found.items() if name != "skipped")
    terminalreporter.section("conformance")
    terminalreporter.line(
        f"{len(every)} cells: {counts}, {len(found['skipped'])} refused, in {seconds:.1f} s"
    )
    reasons: dict[str, list[str]] = {}
    for report in found["skipped"]:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        cell = report.nodeid.partition(CELL)[2].rstrip("]")
        reasons.setdefault(text.removeprefix("Skipped: "), []).append(cell)
    for text, refused in reasons.items():
        terminalreporter.line(f"{len(refused)} x {text}")
        for cell in refused:
            terminalreporter.line(f"    {cell}")
