"""The package as a tree: one line per file, how many statements it has, and which are long.

python tools/tree.py [FOLDER ...]       all of lightning_kv, or some of its folders
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lightning_kv"


def statements(tree: ast.Module) -> int:
    """Logical lines: statements, without docstrings, comments and blank lines."""
    nodes = list(ast.walk(tree))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = sum(isinstance(n, documented) and bool(ast.get_docstring(n)) for n in nodes)
    return sum(isinstance(n, ast.stmt) for n in nodes) - docstrings


def show(folder: Path, depth: int = 0) -> int:
    """Print a folder, its files before its folders; returns its statements."""
    total = 0
    paths = [p for p in sorted(folder.iterdir()) if not p.is_symlink() and p.name[0] not in "._"]
    init = folder / "__init__.py"
    if init.exists():
        paths.insert(0, init)
    for path in sorted(paths, key=Path.is_dir):
        if path.is_dir() and (path / "__init__.py").exists():
            print(f"{'  ' * depth}{path.name}/")
            total += show(path, depth + 1)
        elif path.suffix == ".py":
            source = path.read_text()
            tree, lines = ast.parse(source), source.count("\n")
            count = statements(tree)
            about = (ast.get_docstring(tree) or "").split("\n")[0]
            long = f"  ({lines} lines: is it two ideas?)" if lines > 400 else ""
            print(f"{'  ' * depth + path.name:<34} {count:4}  {about}{long}".rstrip())
            total += count
    return total


if __name__ == "__main__":
    for name in sys.argv[1:] or ["."]:
        if not (ROOT / name).is_dir():
            folders = ", ".join(sorted(init.parent.name for init in ROOT.glob("*/__init__.py")))
            sys.exit(f"No folder {name!r} in {ROOT.name}. Give some of {folders}, or none for all.")
        print(f"{show(ROOT / name)} statements in {(ROOT / name).relative_to(ROOT.parent)}")
