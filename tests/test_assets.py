"""Settings and prompt sets that come with the package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_kv import assets
from lightning_kv.data.shards import PromptShards, read_index

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current folder holds nothing."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_everything_is_found_from_any_folder(elsewhere):
    for kind in ("configs", "data"):
        files = [path for path in (ROOT / kind).rglob("*.*") if path.name != "README.md"]
        assert files
        for path in files:
            there = assets.found(path.relative_to(ROOT))
            assert there.read_bytes() == path.read_bytes()


def test_a_bare_name_is_enough(elsewhere):
    for name in assets.names("configs"):
        there = assets.found(name)
        assert there.name == f"{name}.yaml" and there.is_file()
    for name in assets.names("data"):
        index = read_index(assets.found(name))
        assert len(list(PromptShards(index))) == index.samples > 0


def test_what_is_in_the_current_folder_goes_first(elsewhere):
    own = elsewhere / "configs" / "quickstart.yaml"
    own.parent.mkdir()
    own.write_text("prompts: 1\n")
    assert assets.found("configs/quickstart.yaml").resolve() == own.resolve()


@pytest.mark.parametrize("path", ["nowhere.yaml", "configs/../../cli.py", "/configs/wan.yaml"])
def test_nothing_else_is_found(elsewhere, path):
    assert assets.found(path) == Path(path)


@pytest.mark.slow
def test_a_wheel_holds_them(tmp_path):
    tree = tmp_path / "tree"
    for name in ("lightning_kv", "configs", "data"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    made = subprocess.run([*words, "-w", str(tmp_path), str(tree)], capture_output=True, text=True)
    if "setuptools" in made.stderr and made.returncode:
        pytest.skip(f"setuptools is not installed here: {made.stderr.splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("configs", "data"):
        for path in (ROOT / kind).rglob("*.*"):
            if path.name != "README.md":
                assert f"lightning_kv/assets/{path.relative_to(ROOT)}" in held
    for path in (ROOT / "lightning_kv" / "policies" / "heads").glob("*.json"):
        assert str(path.relative_to(ROOT)) in held
