"""Settings and prompt sets that come with the package, found from any folder.

``configs`` and ``data`` lead to the folders of the checkout, and are copied into an installed
package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HOME = Path(__file__).parent


def found(path: str | Path) -> Path:
    """What somebody named: a path as it is where there is something, else what is shipped.

    Args:
        path: Such as ``configs/quickstart.yaml`` or ``data/panorama-quick``, from the current
            folder or from that of the project; or a bare name: ``quickstart``, ``panorama-quick``.

    Returns:
        The path; as it was given where nothing is there, for the error that is due then.

    Example:
        >>> found("panorama-quick").name, found("nowhere/else.yaml")
        ('panorama-quick', PosixPath('nowhere/else.yaml'))
    """
    path = Path(path)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    bare = len(path.parts) == 1
    names = [path, Path("configs", f"{path}.yaml"), Path("data", path)] if bare else [path]
    return next((HOME / name for name in names if (HOME / name).exists()), path)


def file_of(policy: Any) -> Any:
    """A policy as it was typed; of a YAML file, with or without a budget, the path that is found.

    Example:
        >>> file_of("h2o@9f"), file_of("mine.yaml@9f")
        ('h2o@9f', 'mine.yaml@9f')
    """
    name, at, budget = policy.partition("@") if isinstance(policy, str) else ("", "", "")
    return f"{found(name)}{at}{budget}" if name.endswith((".yaml", ".yml")) else policy


def names(kind: str) -> list[str]:
    """Bare names of what is shipped of a kind.

    Args:
        kind: ``configs`` or ``data``.

    Example:
        >>> "quickstart" in names("configs"), "panorama-quick" in names("data")
        (True, True)
    """
    pattern = {"configs": "*.yaml", "data": "*/index.json"}[kind]
    paths = (HOME / kind).glob(pattern)
    return sorted(path.stem if kind == "configs" else path.parent.name for path in paths)
