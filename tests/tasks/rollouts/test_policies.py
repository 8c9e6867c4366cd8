"""Which policies a run compares: budgets crossed with names."""

import pytest

from lightning_kv.tasks.rollouts.policies import chosen_policies, read_budgets

MINE = {"name": "mine", "retain": {"part": "window", "budget": "3f"}}
BOTH = {
    "name": "both",
    "retain": {"part": "window", "budget": "12f"},
    "select": {"part": "top-attention", "budget": "3f"},
}


def names(policies, budgets, **more):
    found, _ = chosen_policies(policies, budgets=budgets, **more)
    return list(found)


def amounts(policy):
    return [p.budget.amount for p in (policy.retain, policy.select) if p.budget is not None]


def test_policies_with_a_budget_are_crossed_in_order():
    assert names(["full", "sliding-window", "top-attention@3f", "random"], "6f, 9f") == [
        "full",
        "sliding-window@6f",
        "sliding-window@9f",
        "top-attention@3f",
        "random@6f",
        "random@9f",
    ]


def test_crossed_is_the_same_as_written_out():
    crossed, _ = chosen_policies(["sink-window"], budgets=["6f", 0.25])
    written, _ = chosen_policies(["sink-window@6f", "sink-window@0.25"])
    assert crossed == written


def test_files_and_mappings_are_crossed_too(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("name: filed\nselect: {part: random, budget: 3f}\n")
    found, _ = chosen_policies([MINE, str(path), BOTH], budgets="6f,9f")
    assert {name: amounts(policy) for name, policy in found.items()} == {
        "mine@6f": ["6f"],
        "mine@9f": ["9f"],
        "filed@6f": ["6f"],
        "filed@9f": ["9f"],
        "both@6f": ["6f", "2f"],
        "both@9f": ["9f", "2f"],
    }
    assert all(policy.name == name for name, policy in found.items())


def test_the_reference_is_not_crossed():
    found, reference = chosen_policies(["top-attention"], "sliding-window", "6f")
    assert list(found) == ["top-attention@6f"] and amounts(reference) == ["9f"]


def test_without_budgets_nothing_changes():
    assert names(["full", "sliding-window", MINE], None) == ["full", "sliding-window", "mine"]


@pytest.mark.parametrize(
    ("policies", "budgets", "text"),
    [
        (["sliding-window"], "6f,many", "'many' is not a budget"),
        (["sliding-window"], ["6f", "", "9f"], "'' is not a budget"),
        (["sliding-window"], "0f", "'0f' is out of range"),
        (["sliding-window"], "6f,9f,6f", "One budget twice: 6f and 6f of --budgets 6f,9f,6f"),
        (["sliding-window"], ["1024KiB", "1MiB"], "1024KiB and 1MiB"),
        (["sliding-window"], "", "No budgets"),
        (["sliding-window"], [], "No budgets"),
        (["full", "random@9f"], "6f", "no budget to set in full, random@9f"),
        (["sliding-window", "sliding-window@6f"], "6f", "Two policies are called"),
        ([], "6f", "No policies to evaluate"),
    ],
)
def test_what_cannot_be_crossed(policies, budgets, text):
    with pytest.raises(ValueError) as error:
        names(policies, budgets)
    assert text in str(error.value)


def test_budgets_as_people_write_them():
    assert read_budgets("[6f,9f]") == read_budgets(["6f", "9f"]) == ["6f", "9f"]
