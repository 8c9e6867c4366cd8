"""Files from the network: whole and checked, or not there at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lightning_kv.tasks.progress import ProgressLine
from lightning_kv.utilities.errors import first_line
from lightning_kv.utilities.model_folders import has_hub

SILENCE = 60  # seconds without a byte after which a server is given up
BLOCK = 1 << 20
MISSING = (
    'huggingface_hub is not installed (`pip install "lightning_kv[wan]"` brings it, where there is '
    "a network)"
)


class DownloadFailed(Exception):
    """Why nothing came, in one line without a full stop."""


def download(
    url: str, path: Path, check: Callable[[Path], str], resume: bool, force: bool = False
) -> str:
    """Bring one file to ``path``, where it appears only when it is whole and checked.

    Until then it is ``path`` with ``.part`` behind its name. One that broke off goes on where it
    was, if there is a checksum that would find two halves of different files.

    Args:
        url: Its address.
        path: Where it goes; its folder is made.
        check: Called with the whole file before it gets its name; raises where it is another.
        resume: Whether what an earlier call left may be gone on with.
        force: Begin anew.

    Returns:
        What ``check`` gives.

    Raises:
        DownloadFailed: There is no network, no such file, no room, or it broke off.
        ValueError: What ``check`` has to say; the file is gone then.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if force or not resume:
            part.unlink(missing_ok=True)
        _receive(url, part)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadFailed(first_line(error)) from error
    try:
        found = check(part)
    except ValueError:
        part.unlink()  # or the next call would go on with it
        raise
    os.replace(part, path)
    return found


def download_from_hub(
    repo: str, folder: Path, patterns: Sequence[str] | None, force: bool = False
) -> None:
    """Bring files of a model repository into a folder; the hub's client resumes and checks.

    Args:
        repo: Name on the hub.
        folder: Where they go.
        patterns: Which files; all where None.
        force: Download again what is here.

    Raises:
        DownloadFailed: There is no client, no network, no such file or no room.
    """
    need_hub()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError as HubError

    names = list(patterns) if patterns else None
    try:
        snapshot_download(repo, local_dir=folder, allow_patterns=names, force_download=force)
    except (OSError, HubError) as error:
        raise DownloadFailed(first_line(error)) from error


def need_hub() -> None:
    """Refuse to go on without the hub's client.

    Raises:
        DownloadFailed: It is not installed.
    """
    if not has_hub():
        raise DownloadFailed(MISSING)


def _receive(url: str, part: Path) -> None:
    """Bring the rest of a file, shown on a progress line."""
    held = part.stat().st_size if part.exists() else 0
    try:
        answer = _asked(url, held)
    except HTTPError as error:
        if error.code != 416:  # nothing is left behind the bytes that are here
            raise
        return
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise ValueError("the answer is a web page and no file")
        held = held if answer.status == 206 else 0  # 200: the file from its beginning
        total = held + int(answer.headers.get("Content-Length") or 0)
        line = ProgressLine(total >> 20, "MiB", part.stem, held >> 20)
        with part.open("ab" if held else "wb") as file, line:
            while block := answer.read(BLOCK):
                file.write(block)
                line.advance(len(block) / BLOCK)
            came = file.tell()
    if came < total:
        raise ValueError(f"it broke off after {came} of {total} bytes")


def _asked(url: str, held: int) -> HTTPResponse:
    """The answer to a request for a file, without what is here already."""
    headers = {"User-Agent": "lightning_kv", "Accept-Encoding": "identity"}
    if held:
        headers["Range"] = f"bytes={held}-"
    try:
        return urlopen(Request(url, headers=headers), timeout=SILENCE)
    except HTTPError:
        raise
    except URLError as error:  # whose own text is `<urlopen error ...>`
        raise OSError(str(error.reason)) from error
