"""The conformance suite as tests, one for each policy, rule and tape.

``pytest --pyargs lightning_kv.testing --policy my_package.module:MyPart`` holds somebody's part
against every rule; ``--policy`` may be given several times, and may name presets (``h2o@6f``) and
YAML files. Without it all presets are tried. A cell that the policy refuses for a declared need is
skipped, and listed at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_kv.testing.conformance import Refused, candidate_of, cells, presets, tried

MOST = 0.1
"""Share of the cells that all presets together may refuse."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell."""
    specs = metafunc.config.getoption("policy", None) or list(presets())
    if "spec" in metafunc.fixturenames:
        metafunc.parametrize("spec", specs)
    if "rule" not in metafunc.fixturenames:
        return
    found = []
    for spec in specs:
        try:
            candidate = candidate_of(spec)
        except (ValueError, ImportError, AttributeError) as error:
            raise pytest.UsageError(f"--policy {spec}: {error}") from error
        found += [
            pytest.param(candidate, spec, *cell, id="-".join((spec, *cell)).replace(" ", "_"))
            for cell in cells(candidate.policy)
        ]
    metafunc.parametrize(("candidate", "of", "rule", "name"), found)


@pytest.fixture(scope="module")
def tally() -> Iterator[dict[str, list[bool]]]:
    """Of each policy, whether its cells were tried or refused."""
    yield {}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_cell(candidate, of, rule, name, tally):
    """The rule holds on the tape, or the policy says what it lacks there."""
    try:
        tried(candidate, rule, name)
    except Refused as refusal:
        tally.setdefault(of, []).append(False)
        pytest.skip(f"refused: {refusal}")
    tally.setdefault(of, []).append(True)


def test_not_everything_is_refused(spec, tally):
    """A policy that refuses many cells has not been tested."""
    found = tally.get(spec, [True])
    assert sum(found) >= 0.7 * len(found), f"{spec} refuses {found.count(False)} of {len(found)}"


def test_refusals_are_few(tally):
    """All presets together refuse at most a tenth of the cells."""
    found = [tried for own in tally.values() for tried in own]
    if set(presets()) <= set(tally):
        assert found.count(False) <= MOST * len(found), f"{found.count(False)} of {len(found)}"
