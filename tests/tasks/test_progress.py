"""Progress lines: what they show on a terminal, and nothing elsewhere."""

import re

from lightning_kv.tasks.progress import ProgressLine, RolloutProgress


class Cache:
    def held_bytes(self, index):
        return 3 * 2**20


def last(shown):
    """The line as it is at the end."""
    return shown().strip().rpartition("\r")[2].rpartition("\n")[2]


def test_a_line_says_what_how_much_and_how_long(screen):
    shown = screen(terminal=True)
    with ProgressLine(8, "frames", "reading", done=2) as line:
        line.advance(1)
        line.advance(1, "a.mp4", "slowly")
        line.advance(1)
    said = last(shown)
    assert re.search(r"^a\.mp4 .* 5/8 frames", said) and "slowly" not in said
    assert re.search(r"frames +(\d\d:\d\d|--:--)", said), "the time left"


def test_a_line_is_silent_without_a_terminal_and_on_other_ranks(screen):
    shown = screen(terminal=False)
    with ProgressLine(8, "frames") as line:
        line.advance(8)
    assert shown() == ""
    shown = screen(terminal=True)
    with ProgressLine(8, "frames", visible=False) as line:
        line.advance(8)
    assert shown() == ""


def test_rollouts_are_counted_in_chunks_with_their_prompt_speed_and_cache(screen):
    shown = screen(terminal=True)
    with RolloutProgress(prompts=3, chunks=4, chunk_frames=3, visible=True) as line:
        line.begin("full", 1)
        for chunk in range(4):
            line.chunk(chunk, Cache())
        line.end(1)
        line.begin("window", 1)
        line.chunk(0, Cache())
    said = last(shown)
    assert re.search(r"^prompt 2/3 window .* 5/12 chunks", said)
    assert re.search(r"\d frames/s +cache 3\.00 MiB", said)


def test_one_prompt_is_not_counted(screen):
    shown = screen(terminal=True)
    with RolloutProgress(prompts=1, chunks=2, chunk_frames=3, visible=True) as line:
        line.begin("full", 1)
        line.chunk(0, Cache())
    assert last(shown).startswith("full ")
