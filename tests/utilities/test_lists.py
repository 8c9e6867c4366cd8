"""Lists in one word, wherever they are written."""

import pytest

from lightning_kv.commands.parsing import as_list
from lightning_kv.metrics.plugins import in_a_list
from lightning_kv.tasks.rollouts.policies import read_budgets
from lightning_kv.utilities.lists import items_of


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[a,b]", ["a", "b"]),
        ("a, b", ["a", "b"]),
        (" [fvd/i3d=some/file] ", ["fvd/i3d=some/file"]),
        ("[]", []),
        ("", []),
        ("[a,,b,]", ["a", "b"]),
    ],
)
def test_brackets_and_blanks_change_nothing(text, items):
    assert items_of(text) == as_list(text) == in_a_list(text) == items


@pytest.mark.parametrize("text", ["[6f", "6f]", "6f,9f]"])
@pytest.mark.parametrize("read", [items_of, as_list, in_a_list, read_budgets])
def test_a_bracket_that_is_not_closed_is_said_everywhere(read, text):
    with pytest.raises(ValueError, match=r"has brackets that do not match\. Write \[a,b\] or a,b"):
        read(text)
