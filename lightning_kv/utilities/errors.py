"""What an error says, without how it came here."""

from __future__ import annotations

import errno

PLACES = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
}
"""Errors of the system that are about a file or folder."""

TRACEBACK = "Traceback (most recent call last):\n"


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")


def said_by(error: BaseException) -> str:
    r"""What an error said where it was raised.

    One that a worker of torch's DataLoader has raised arrives with the worker's traceback in its
    words.

    >>> said_by(ValueError("It is red. Given 3. Use 4."))
    'It is red. Given 3. Use 4.'
    >>> said_by(ValueError("Caught ValueError in DataLoader worker process 0.\n"
    ...     "Original Traceback (most recent call last):\n  File ...\nValueError: It is red."))
    'It is red.'
    """
    text = str(error)
    if not (text.startswith("Caught ") and f"\nOriginal {TRACEBACK}" in text):
        return text
    lines = text.rpartition(TRACEBACK)[2].rstrip().split("\n")
    first = next(at for at, line in enumerate(lines) if not line.startswith(" "))
    return "\n".join(lines[first:]).partition(": ")[2] or lines[first]


def of_system(error: OSError) -> str | None:
    """What the system refused, for whoever named the place; None where it is about no place.

    >>> of_system(FileExistsError(17, "File exists", "a/b"))
    "Nothing is read or written there. Given a/b: 'File exists'. Give another place, or mend it."
    """
    if error.filename is None and error.errno not in PLACES:
        return None
    place = "" if error.filename is None else f"{error.filename}: "
    return (
        f"Nothing is read or written there. Given {place}{error.strerror!r}. Give another "
        "place, or mend it."
    )
