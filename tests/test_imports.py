"""Who may import whom: the rules of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_kv"
RULES = {
    "cache": {"cache"},
    "policies": {"cache", "policies"},
    "models": {"cache", "models"},
    "rollout": {"cache", "policies", "models", "rollout"},
    "calibration": {"cache", "policies", "models", "rollout", "calibration"},
    "distillation": {"cache", "policies", "models", "rollout", "calibration", "distillation"},
    "testing": {"cache", "policies", "models", "rollout", "testing"},
    "data": {"data"},
    "stats": {"stats"},
    "assets": {"assets"},
    "utilities": {"utilities"},
    "metrics": {"metrics", "stats"},
    "runs": {"runs", "stats"},
    "report": {"report", "runs", "stats"},
    "tasks": {"cache", "policies", "models", "rollout", "testing", "data", "metrics", "stats"}
    | {"runs", "report", "calibration", "distillation", "tasks"},
}
COMMAND_LINE = {"commands"}
FROM_OUTSIDE = {
    "cache": {"torch"},
    "policies": {"torch", "yaml", "safetensors"},  # head curves lie in such files
    "models": {"torch", "yaml", "safetensors", "numpy"},  # numpy draws the noise
    "rollout": {"torch"},
    "calibration": {"torch"},
    "distillation": {"torch", "torchmetrics"},
    "testing": {"torch", "pytest"},
    "stats": {"numpy", "scipy"},
    "assets": set(),
    "utilities": {"huggingface_hub"},
    "runs": {"numpy", "av", "PIL"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "lightning_kv":
                yield from (f"lightning_kv.{alias.name}" for alias in node.names)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_it_may(path):

    floor = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "lightning_kv" and rest and floor in RULES:
            assert rest[0] in RULES[floor] | {"__version__", "utilities"}, f"{floor} imports {name}"
        if top == "lightning_kv" and rest[:1] == ["cli"]:
            assert floor == "__main__", f"{floor} imports the command line"
        if top == "lightning_kv" and rest[:1] and rest[0] in COMMAND_LINE:
            assert floor in ("cli", "commands"), f"{floor} imports what belongs to the command line"
        if top == "lightning":
            assert floor in ("tasks", "commands", "cli") or "datamodule" in path.parts, (
                f"{floor} imports lightning"
            )
        if floor in FROM_OUTSIDE and top != "lightning_kv":
            known = FROM_OUTSIDE[floor] | sys.stdlib_module_names
            assert top in known, f"{floor} imports {name}"


def test_the_rules_see_every_floor():
    floors = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES}
    assert set(RULES) <= floors
    assert floors - set(RULES) == {"__init__", "__main__", "cli", *COMMAND_LINE}


SHARED = {"class_paths", "download", "options", "progress", "trainer", "videos"}
GRAMMAR = {"options", "parsing", "terminal"}


def test_a_command_is_found_under_its_name():
    """In ``commands`` what is typed, in ``tasks`` what is done; nothing else lies there."""
    from lightning_kv.cli import COMMANDS

    commands = {name.replace("-", "_") for name in COMMANDS}
    files = {
        folder: {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"}
        for folder in ("commands", "tasks")
    }
    assert files["commands"] == commands | GRAMMAR
    assert files["tasks"] - SHARED <= commands


@pytest.mark.parametrize(
    "first", ["lightning_kv", "lightning_kv.cli", "lightning_kv.testing.plugin"]
)
def test_what_every_process_imports_loads_no_torch(first):
    code = f"import sys, {first}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_training_loads_no_metric_and_the_callbacks_are_found_by_name():
    code = """
import sys
import lightning_kv.tasks.training.module
print([x for x in sys.modules if x.startswith(("lightning_kv.metrics", "lightning_kv.report"))])
import lightning_kv.tasks.callbacks as callbacks
print({getattr(callbacks, name).__name__ for name in callbacks.__all__} == {*callbacks.__all__})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["[]", "True"], found.stderr


def test_the_names_of_the_package_do_not_depend_on_what_was_imported_before():
    """In one process, which forgets the package in between, but not what takes long: torch."""
    code = """
import sys
for before in ("", "import lightning_kv.rollout", "import lightning_kv.cli"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_kv"]:
        del sys.modules[name]
    exec(before)
    import lightning_kv as kv
    print([callable(getattr(kv, name)) for name in kv.__all__])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    counts = [line.count("True") for line in found.stdout.splitlines()]
    assert counts == [6, 6, 6], found.stderr  # all but the version
