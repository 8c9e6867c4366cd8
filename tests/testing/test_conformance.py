"""The conformance suite finds faults: a correct part obeys every rule, broken ones do not."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import parts
from parts import budgeted, policy

import lightning_kv
from lightning_kv.policies.base import RetainPart, UnitPart
from lightning_kv.policies.registry import build_part
from lightning_kv.testing.candidate import Candidate, tape
from lightning_kv.testing.conformance import RULES, obey


@pytest.mark.parametrize("granularity", ["frame", "token"])
def test_a_correct_part_obeys_every_rule(granularity):
    assert obey(policy(budgeted(parts.Longest, granularity=granularity, sink=1))) == {}


def test_what_is_remembered_in_a_queue_is_counted():
    part = budgeted(parts.RemembersTheLast)
    assert obey(policy(part), "bytes_are_real", "memory_is_bounded") == {}


FAULTS = {
    "views_are_not_written": {
        "written to a tensor": budgeted(parts.WritesAnEntry),  # the cache's own refusal
        "the question to WritesUnseen.*has changed": budgeted(parts.WritesUnseen),
        "queries, keys or values of a pass were overwritten": parts.WritesQueries(),
    },
    "parts_hold_no_state": {
        "RemembersInItself.* has changed": budgeted(parts.RemembersInItself),
        "RemembersInItsClass.* has changed": budgeted(parts.RemembersInItsClass),
    },
    "samples_are_strangers": {
        "sample 1 of a batch has other rows kept": budgeted(parts.LooksAtTheFirst),
    },
    "noisy_passes_leave_memory_alone": {
        "written to a tensor": parts.DropsInNoise(),  # the cache's own refusal
        "a noisy pass of frames .* has changed": parts.MovesInNoise(),
    },
    "budgets_are_kept": {
        "54 rows held, 48.0 allowed": budgeted(parts.IgnoresItsBudget),
    },
    "reads_keep_to_their_budget": {"42 rows read, 36.0 allowed": budgeted(parts.ReadsTooMuch)},
    "protected_rows_stay": {
        "0 of 6 rows of frame 0": budgeted(parts.ForgetsItsSink),
        "0 of 6 rows of frame 8": budgeted(parts.ChunksOfThree),
    },
    "a_budget_of_everything_loses_nothing": {
        "against full": budgeted(parts.LosesAtAnyBudget),
    },
    "runs_everywhere": {"gave scores": budgeted(parts.SixTokens)},  # the cache's own refusal
    "the_same_seed_gives_the_same": {"the second time": budgeted(parts.DrawsAtRandom)},
    "the_chunk_in_flight_is_read": {"nothing of its own frame": parts.SkipsItsChunk()},
    "bytes_are_real": {"some tensors are not counted": parts.HidesBytes()},
    "memory_is_bounded": {"bytes of states go on growing": budgeted(parts.NeverForgets)},
    "plans_wait_for_nothing": {"denoise pass 1": parts.AsksTheHost()},
    "no_stale_rows_after_events": {"rows of frames from 12": budgeted(parts.RenamesItsRows)},
    "scratch_passes_change_nothing": {"with scratch passes between": parts.CountsItsQuestions()},
    "policies_are_plain_data": {"not JSON serializable": budgeted(parts.NotPlain)},
}
CASES = [(rule, text, part) for rule, own in FAULTS.items() for text, part in own.items()]


@pytest.mark.parametrize(("rule", "text", "part"), CASES, ids=[type(c[2]).__name__ for c in CASES])
def test_a_fault_breaks_the_rule_about_it(rule, text, part):
    with pytest.raises((AssertionError, ValueError, TypeError), match=text):
        obey(policy(part), rule)


def test_faults_spoil_nothing_for_others():
    """The tapes that were written into are those of the part alone."""
    obey(policy(parts.WritesQueries()), "runs_everywhere")
    assert obey(policy(budgeted(parts.Longest)), "a_budget_of_everything_loses_nothing") == {}


def test_state_is_found_after_other_rules_have_left_it_behind():
    part = budgeted(parts.RemembersInItsClass, granularity="token")
    with pytest.raises(AssertionError, match="has changed"):
        obey(policy(part), "runs_everywhere", "parts_hold_no_state")


def test_most_rules_have_a_fault_that_breaks_them():
    without = set(RULES) - set(FAULTS)
    # the cache itself sees to these, whatever a part does
    assert without == {"buffers_agree", "kernels_agree", "branches_decide_alike"}


# -- refusals --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Square(UnitPart):
    """Works on square frames only, and says so."""

    name: ClassVar[str] = "square"

    def check(self, geometry, chunk, frames):
        if len(set(geometry.grid)) > 1:
            raise ValueError(
                "The retain part 'square' wants square frames. Use a model with as many token rows "
                "as columns."
            )


def test_a_part_that_is_made_for_one_size_does_not_get_away_with_saying_so():
    with pytest.raises(AssertionError, match=r"no policy may be made for one size: .* 'square'"):
        obey(policy(budgeted(Square)), "runs_everywhere")


@pytest.mark.parametrize("rules", [("runs_everywhere",), pytest.param((), marks=pytest.mark.slow)])
def test_a_table_of_another_model_is_drawn_anew_for_every_tape(rules):
    table = {"part": "table", "amount": "8f", "shares": [[1.0, 0.5, 1.0, 1.0, 1.0]] * 2}
    given = policy(build_part("retain", {"part": "window", "budget": table}))
    assert obey(given, *rules) == {}
    for name in ("chunks of 3", "recorded"):
        part = Candidate(given).fitted(name).retain.budget
        part.check(tape(name).geometry, 1)
        assert {x for row in part.shares.rows for x in row} == {0.5, 1.0}


@dataclass(frozen=True)
class Curt(RetainPart):
    """Needs clean rows, and says no more than that."""

    name: ClassVar[str] = "curt"

    def commit(self, views, state):
        if not views[0].clean:
            raise ValueError("no clean rows")
        return [None] * len(views)


def test_a_refusal_without_a_way_out_is_a_fault():
    with pytest.raises(AssertionError, match="without a way out"):
        obey(policy(Curt()), "runs_everywhere")


def test_clean_rows_are_a_declared_need():
    part = build_part("retain", {"part": "future", "budget": "8f"})
    refused = obey(policy(part), "runs_everywhere")
    assert set(refused) == {
        ("runs_everywhere", "no commit pass"),
        ("runs_everywhere", "rolling, no commit pass"),
    }


# -- from the command line -------------------------------------------------------------------


def run(*arguments, cwd):
    command = [sys.executable, "-m", "pytest", "-p", "lightning_kv.testing.plugin"]
    command += ["--pyargs", "lightning_kv.testing", "-q", "-p", "no:cacheprovider"]
    home = {"PYTHONPATH": str(Path(lightning_kv.__file__).parents[1])}
    found = subprocess.run(
        [*command, *arguments], cwd=cwd, capture_output=True, text=True, env=os.environ | home
    )
    return found.returncode, found.stdout + found.stderr


def test_policies_are_named_on_the_command_line(tmp_path):
    """Names, budgets and files; what is refused is listed with its reason."""
    shares = "{part: table, amount: 6f, shares: [[1, 1, 1], [0.5, 1, 1.5]]}"
    (tmp_path / "mine.yaml").write_text(f"name: mine\nretain: {{part: window, budget: {shares}}}\n")
    given = ("--policy", "mine.yaml", "--policy", "expected-attention@6f")
    chosen = "runs_everywhere and (recorded or (rolling and commit))"
    code, text = run(*given, "-k", chosen, cwd=tmp_path)
    assert code == 0, text
    assert "4 cells: 3 passed, 0 failed, 1 refused" in text
    assert "1 x refused: The retain part 'expected-attention'" in text
    assert "expected-attention@6f-runs_everywhere-rolling,_no_commit_pass" in text


@pytest.mark.slow
def test_an_unknown_policy_is_an_error(tmp_path):
    code, text = run("--policy", "h3o", cwd=tmp_path)
    assert code != 0 and "--policy h3o: No policy 'h3o'. Did you mean 'h2o'?" in text
