"""Shared fixtures."""

import gc
from collections import Counter

import pytest
import torch

torch.set_num_threads(1)

# More than 10 seconds, longest first: a worker that takes one last works on alone.
LONG = (
    *("tests/test_rollout.py", "tests/test_cli.py", "tests/tasks/callbacks/test_callbacks.py"),
    *("tests/test_wan_commands.py", "tests/tasks/callbacks/test_policy_evaluation.py"),
    *("tests/policies/test_oracle.py", "tests/cache/test_record.py", "tests/tasks/test_module.py"),
    *("tests/policies/test_future.py", "tests/test_readme.py", "tests/policies/test_focused.py"),
    *("lightning_kv/testing/test_conformance.py", "tests/testing/test_conformance.py"),
    *("tests/test_peak_memory.py", "tests/test_parity.py", "tests/policies/test_budgets.py"),
    *("tests/tasks/test_compare.py", "tests/cache/test_decisions.py", "tests/test_waits.py"),
    *("tests/cache/test_session.py", "tests/test_real_rollouts.py", "tests/cache/test_modes.py"),
    *("tests/policies/test_plugins.py", "tests/tasks/test_recording.py"),
)


THINNED = {"lightning_kv/testing/test_conformance.py::test_cell": 11}
"""As the marker says; of tests that are part of the package."""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the second step of .ci/run")
    parser.addoption("--full", action="store_true", help="all cells, and what takes hours")


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose
def pytest_collection_modifyitems(config, items):
    seen = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        marker = item.get_closest_marker("thinned")
        place = seen[test] % (marker.args[0] if marker else THINNED.get(test, 1))
        if place:  # of the cells between two quick ones every second is left to --full
            item.add_marker(pytest.mark.slow)
            if place % 2 == 0:
                item.add_marker(pytest.mark.full)
        seen[test] += 1
    left_out = [name for name in ("slow", "full") if not config.getoption(name)]
    later = {item for item in items if any(map(item.get_closest_marker, left_out))}
    config.hook.pytest_deselected(items=[item for item in items if item in later])
    items[:] = [item for item in items if item not in later]
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        place = {path: number for number, path in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def pytest_collection_finish():
    """Modules and items stay to the end: a full collection need not go through all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """What tests write need not outlive the machine; where it must, a test says so itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture
def page():
    """Asked for where ``no_page`` holds for a whole file: here a page is written all the same."""


@pytest.fixture
def no_page(request, monkeypatch):
    """Runs end with their summary, without a page: to draw it takes longer than many a run.

    Runs that a fixture of a wider scope makes have theirs, and ``report`` writes none here.
    """
    if "page" not in request.fixturenames:
        monkeypatch.setattr("lightning_kv.tasks.report.write_report", lambda *_: None)


@pytest.fixture(scope="session")
def panorama():
    """The embedded model."""
    from lightning_kv import load_model

    return load_model("panorama")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """Folder of a tiny Wan with random weights, in the files of a published one."""
    import runpy
    import sys
    from pathlib import Path

    pytest.importorskip("diffusers", reason="the extra [wan] is not installed")
    pytest.importorskip("transformers", reason="the extra [wan] is not installed")
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    tool = Path(__file__).parents[1] / "tools" / "make_tiny_wan.py"
    words, sys.argv = sys.argv, [str(tool), str(folder)]
    try:
        with torch.random.fork_rng():  # it sets the seed
            runpy.run_path(str(tool), run_name="__main__")
    finally:
        sys.argv = words
    return folder
