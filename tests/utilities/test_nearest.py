"""Suggestions for what was misspelled: said where one is near, and one function says them."""

from pathlib import Path

import pytest

import lightning_kv
from lightning_kv.utilities.nearest import hint, unknown

PLACES = ["recall", "recall_far", "latent_mse", "dino-vitb16", "wan-1.3b"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("recal", "recall"),
        ("recall-far", "recall_far"),
        ("dino", "dino-vitb16"),  # the beginning of a long name
        ("wan", "wan-1.3b"),
        ("wan-1.3", "wan-1.3b"),
        (13, None),
        ("", None),
        ("d", None),
        ("bogus", None),
        ("kvcache", None),
    ],
)
def test_what_is_near_is_asked_for_and_nothing_else(given, meant):
    assert hint(given, PLACES) == (f" Did you mean {meant!r}?" if meant else "")
    assert unknown("thing", given, iter(PLACES)) == (
        f"No thing {given!r}.{hint(given, PLACES)} Known: {', '.join(PLACES)}."
    )


def test_a_name_may_be_shown_in_another_way():
    shown = {"num_nodes": "trainer.num_nodes"}
    assert hint("num_node", ["seed", "num_nodes"], shown) == " Did you mean 'trainer.num_nodes'?"
    assert hint("sed", ["seed", "num_nodes"], shown) == " Did you mean 'seed'?"


def test_nobody_else_guesses():
    home = Path(lightning_kv.__file__).parent
    guess = [path for path in home.rglob("*.py") if "get_close_matches" in path.read_text()]
    assert guess == [home / "utilities" / "nearest.py"]
