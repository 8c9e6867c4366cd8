"""Shared fixtures."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the long matrices")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        long = [item for item in items if item.get_closest_marker("full")]  # not a mere id "full"
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def panorama():
    """The embedded model."""
    from lightning_kv import load_model

    return load_model("panorama")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """Folder of a tiny Wan with random weights, in the files of a published one."""
    import subprocess
    import sys
    from pathlib import Path

    pytest.importorskip("diffusers", reason="the extra [wan] is not installed")
    pytest.importorskip("transformers", reason="the extra [wan] is not installed")
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    tool = Path(__file__).parents[1] / "tools" / "make_tiny_wan.py"
    subprocess.run([sys.executable, tool, folder], check=True, capture_output=True)
    return folder
