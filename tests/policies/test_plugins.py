"""Parts of somebody else's package: by address, by entry point, in files; and what is refused."""

import hashlib
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.part import PARTS, PRESETS, Preset
from lightning_kv.policies.plugins import GROUP, sources
from lightning_kv.policies.registry import (
    load_policy,
    policy_from_dict,
    policy_to_dict,
    preset,
    presets,
)

ROOT = Path(__file__).parents[2]
OWN = '''
from dataclasses import dataclass
from typing import ClassVar

from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Thinned(UnitPart):
    """Keep every n-th frame.

    Args:
        every: Frames between two that are kept.
    """

    name: ClassVar[str] = "{name}"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "{name}-by-3",
            "Every third.",
            parts={{"retain": {{"part": "{name}", "every": 3, "budget": "5f"}}}},
        ),
    )
    every: int = 2

    def scores(self, view, state):
        return -(view.frame_ids % self.every).double().view(1, 1, -1)


class Plain:
    """No part."""


@dataclass(frozen=True)
class Bare(UnitPart):
    """Without a name."""


class Undecorated(UnitPart):
    """Its settings would be lost."""

    every: int = 2


def function():
    """No class."""
'''


HELPED = '''
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_kv.policies.base import SelectPart
from {name}.helper import EVERY


@dataclass(frozen=True)
class Helped(SelectPart):
    """Reads what a helper says."""

    name: ClassVar[str] = "helped-{name}"
    needed: int = field(kw_only=True)
    strict: int = 1

    def __post_init__(self):
        if self.strict > 1:
            raise KeyError(self.strict)
'''


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A package ``PKG.mine`` in the current folder, of another name for every test."""
    name = f"pkg_{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:10]}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "mine.py").write_text(OWN.format(name=f"thin-{name}"))
    (folder / "broken.py").write_text("import torch\n\n1 / 0\n")
    (folder / "taken.py").write_text(OWN.format(name="window"))
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "syntax.py").write_text("def broken(:\n")
    (folder / "odd.py").write_text(OWN.format(name="a@b").replace("Thinned", "Odd"))
    (folder / "helped.py").write_text(HELPED.format(name=name))
    (folder / "helper.py").write_text("EVERY = 3\n")
    monkeypatch.chdir(tmp_path)
    yield name
    for known in (*PARTS.values(), PRESETS):
        for key in [k for k in known if name in k]:
            del known[key]
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_a_part_is_found_by_its_address(package):
    before = list(sys.path)
    policy = load_policy(f"{package}.mine:Thinned@6f")
    assert sys.path == [*before, str(Path.cwd())], "it may import more from there later"
    assert policy.name == f"{package}.mine:Thinned@6f"
    assert (type(policy.retain).__name__, policy.retain.budget.amount) == ("Thinned", "6f")
    config = policy_to_dict(policy)
    assert config["retain"]["part"] == f"{package}.mine:Thinned", "any process can find it again"
    assert policy_from_dict(json.loads(json.dumps(config))) == policy


def test_its_names_are_known_once_it_is_imported(package):
    load_policy(f"{package}.mine:Thinned")
    assert preset(f"thin-{package}@7f").retain.every == 2
    assert preset(f"thin-{package}-by-3").retain.every == 3
    assert f"thin-{package}-by-3" in presets()


def test_in_a_policy_file_with_a_budget_behind_it(package, tmp_path):
    path = tmp_path / "deep" / "x.yaml"
    path.parent.mkdir()
    path.write_text(f"name: x\nretain: {{part: '{package}.mine:Thinned', every: 4, budget: 5f}}\n")
    made = load_policy("deep/x.yaml@12f")
    assert (made.name, made.retain.every, made.retain.budget.amount) == ("x@12f", 4, "12f")
    assert load_policy("deep/x.yaml").retain.budget.amount == "5f"


def test_without_a_budget_it_takes_the_usual_one_and_it_may_exceed_a_short_rollout(package):
    policy = load_policy(f"{package}.mine:Bare")
    assert policy.retain.budget.amount == "9f"
    assert not policy.asked


def test_the_files_of_other_packages_have_checksums(package, tmp_path):
    policy = load_policy(f"{package}.mine:Thinned@6f")
    digest = hashlib.sha256((tmp_path / package / "mine.py").read_bytes()).hexdigest()
    own = sources(policy.parts)
    assert own[f"{package}.mine"] == digest
    assert sources(preset("h2o").parts) == {}


def test_what_a_part_imports_from_its_own_package_counts_too(package, tmp_path):
    part = {"part": f"{package}.helped:Helped", "needed": 1}
    before = sources(policy_from_dict({"name": "x", "select": part}).parts)
    (tmp_path / package / "helper.py").write_text("EVERY = 4\n")
    after = sources(policy_from_dict({"name": "x", "select": part}).parts)
    assert {name for name in before if before[name] != after[name]} == {f"{package}.helper"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs needed. Given: nothing. Write them beside"),
        ({"needed": 1, "strict": 2}, "does not take .* KeyError: 2. Give other settings"),
    ],
)
def test_settings_of_somebody_elses_class_are_refused_in_words(package, settings, said):
    part = {"part": f"{package}.helped:Helped", **settings}
    with pytest.raises(ValueError, match=said):
        policy_from_dict({"name": "x", "select": part})


def test_names_are_one_set_for_parts_of_all_kinds_and_for_methods():
    """A method may be called like the part that declares it, and like no other."""
    with pytest.raises(ValueError, match="'window' is taken"):

        @dataclass(frozen=True)
        class Select(SelectPart):
            name: ClassVar[str] = "window"

    with pytest.raises(ValueError, match="'sink-window' is taken"):

        @dataclass(frozen=True)
        class Part(SelectPart):
            name: ClassVar[str] = "sink-window"

    with pytest.raises(ValueError, match="'focused' is taken"):

        @dataclass(frozen=True)
        class Method(SelectPart):
            presets: ClassVar[tuple[Preset, ...]] = (Preset("focused", "Mine."),)


def test_a_part_without_a_budget_in_a_file_takes_the_one_behind_it(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nretain: {part: window, sink: 2}\n")
    assert load_policy(f"{path}@6f").retain.budget.amount == "6f"
    assert load_policy(str(path)).retain.budget is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{p}.none:Part", r"part '{p}\.none:Part' cannot be imported: ModuleNotFoundError.* Give"),
        ("{p}.broken:Part", r"ZeroDivisionError: .*broken\.py:3\)\. Give"),
        ("{p}.mine:Plain", r"is no part of a policy\. It is the class Plain, .*: Thinned, Bare"),
        ("{p}.mine:function", r"is no part of a policy\. It is 'function'"),
        ("{p}.mine:Thined", r"is no part of a policy\. It is nothing; .* Thinned"),
        ("{p}.mine:", r"is no address of a class"),
        ("{p}/mine.py:Thinned", r"is no address of a class\. Give PACKAGE\.MODULE:CLASS"),
        ("./mine.py:Thinned", r"is no address of a class"),
        ("{p}.exits:Part", r"cannot be imported: SystemExit: 3 .*exits\.py:2\)"),
        ("{p}.syntax:Part", r"cannot be imported: SyntaxError"),
        ("{p}.odd:Odd", r"'a@b' cannot be the name"),
        ("{p}.mine:UnitPart", r"is no part of a policy\. It is the class UnitPart"),
        ("{p}.mine:Undecorated", r"no dataclass of its own.*Write @dataclass\(frozen=True\)"),
        ("{p}.taken:Thinned", r"name 'window' is taken\. .* Give yours another"),
        ("window:Window", r"part 'window:Window' cannot be imported"),
    ],
)
def test_what_is_no_plug_in_is_said_in_three_parts(package, spec, said):
    with pytest.raises(ValueError, match=said.replace("{p}", package)):
        load_policy(spec.format(p=package))
    assert PARTS["retain"]["window"].__module__ == "lightning_kv.policies.retain.window"


def test_of_the_wrong_kind(package):
    part = {"part": f"{package}.mine:Thinned"}
    with pytest.raises(ValueError, match=r"given as the select part, .* Write it under `retain:`"):
        policy_from_dict({"name": "x", "select": part})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "It holds no mapping but list"),
        ("name: [", "It is no YAML"),
        ("name: x\nretan: window", "No key of a policy 'retan'. Did you mean 'retain'"),
        ("retain: window", "A policy without `name:`"),
    ],
)
def test_what_is_wrong_in_a_policy_file_names_the_file(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"In the policy file '.*mine\.yaml': {said}"):
        load_policy(f"{path}@9f")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("everything", "alone is no policy: it is a retain and a select part"),
        ("uniform@9f", "alone is no policy: it is a budget part"),
        ("heavy-hiters@9f", "No policy 'heavy-hiters'. Did you mean 'heavy-hitters'"),
        ({"name": "x", "select": {"part": "reach", "budget": "9f"}}, "'reach' takes no budget"),
        ({"name": "x", "retain": {"part": "everything", "budget": "9f"}}, "takes no budget"),
        ("reach@9f", "has no budget"),
    ],
)
def test_what_is_no_policy_alone(spec, said):
    with pytest.raises(ValueError, match=said):
        load_policy(spec)


@pytest.mark.parametrize("kind", [k for k in PARTS if k != "budget"])
def test_every_part_is_a_policy_by_its_own_name(kind):
    presets()  # imports all
    for name, cls in PARTS[kind].items():
        if not cls.__module__.startswith("lightning_kv.") or name == "everything":
            continue
        made = preset(name)
        assert made.name == name
        assert name in presets() or type(getattr(made, kind)) is cls
        if getattr(cls, "limited", False):
            assert preset(f"{name}@5f").budgeted("6f").name == f"{name}@5f"


def test_a_preset_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match=r"'h2o' is taken\. .*HeavyHitters has it"):

        @dataclass(frozen=True)
        class Mine(SelectPart):
            presets: ClassVar[tuple[Preset, ...]] = (Preset("h2o", "Mine."),)

    assert PRESETS["h2o"][1].__name__ == "HeavyHitters"


def installed(site, package, entry):
    """What pip leaves of a package that offers an entry point."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")


def list_policies(site):
    code = "from lightning_kv.cli import main; main(['list', 'policies', '--json'])"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{site}:{ROOT}", "PATH": ""},
        cwd=site.parent,
    )


@pytest.mark.parametrize("entry", ["thin = {p}.mine:Thinned", "all = {p}.mine"])
@pytest.mark.thinned(2)
def test_an_installed_package_is_found_by_its_entry_point(package, tmp_path, entry):
    installed(tmp_path, package, entry.format(p=package))
    found = list_policies(tmp_path)
    names = [row["policy"] for row in json.loads(found.stdout)]
    assert names[0] == "full"
    assert f"thin-{package}-by-3" in names
    assert not found.stderr


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("x = {p}.broken", "ZeroDivisionError"),
        ("x = {p}.mine:Plain", "is no part with a `name`"),
        ("x = {p}.taken", "name 'window' is taken"),
        ("x = nowhere.mine", "No module named 'nowhere'"),
    ],
)
@pytest.mark.thinned(4)
def test_an_entry_point_that_brings_nothing_is_said_and_the_others_go_on(
    package, tmp_path, entry, said
):
    installed(tmp_path, package, entry.format(p=package))
    found = list_policies(tmp_path)
    assert len(json.loads(found.stdout)) >= 12
    text = textwrap.dedent(found.stderr)
    assert said in text
    assert "Mend or uninstall it" in text


def test_a_name_that_two_installed_packages_want_belongs_to_neither(package, tmp_path):
    for one in ("first", "second"):
        (tmp_path / f"{package}_{one}.py").write_text(OWN.format(name="both"))
        installed(tmp_path, f"{package}_{one}", f"x = {package}_{one}:Thinned")
    code = (
        "from lightning_kv.policies.registry import load_policy, presets\n"
        "presets()\n"
        "load_policy('both@6f')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
    )
    last = found.stderr.strip().splitlines()[-1]
    assert "ValueError: The name 'both' is taken" in last
    assert f"{package}_first:Thinned" in last and f"{package}_second:Thinned" in last
    assert "uninstall one of their packages" in last


def test_a_published_method_that_cannot_be_built_is_left_out(package, tmp_path):
    text = OWN.format(name="fine").replace('"every": 3', '"evry": 3')
    (tmp_path / f"{package}_bad.py").write_text(text)
    installed(tmp_path, f"{package}_bad", f"x = {package}_bad:Thinned")
    found = list_policies(tmp_path)
    names = [row["policy"] for row in json.loads(found.stdout)]
    assert "fine-by-3" not in names and "h2o" in names
    assert "'fine-by-3'" in found.stderr and "mend its `parts`" in found.stderr


def test_shipped_policy_files_work_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted((ROOT / "configs" / "policies").glob("*.yaml"))
    assert files
    for path in files:
        load_policy(str(path))
    table = load_policy("focused-forcing-paper")
    budget = policy_to_dict(table)["select"]["budget"]["importance"]
    heads = ROOT / "lightning_kv/policies/heads/focused-forcing-wan-1.3b.json"
    assert budget["file"] == heads.stem
    assert budget["sha256"] == hashlib.sha256(heads.read_bytes()).hexdigest()


def test_the_meaning_of_every_setting_is_listed():
    from lightning_kv.commands.list import parts

    rows = {(row["kind"], row["part"]): row for row in parts()}
    for (kind, part), row in rows.items():
        if not PARTS[kind][part].__module__.startswith("lightning_kv."):
            continue
        for name, text in row.get("settings", {}).items():
            assert not text.startswith("-"), f"{row['part']}: {name} is not explained"
    assert rows["retain", "window"]["settings"]["sink"].endswith("they count in the budget. [0]")


def test_the_settings_of_a_part_of_ones_own_are_listed_by_its_address(package, capsys):
    from lightning_kv.cli import main

    main(["list", "parts", f"{package}.mine:Thinned", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["part"] == f"{package}.mine:Thinned"
    assert row["settings"]["every"] == "Frames between two that are kept. [2]"


@pytest.mark.slow
def test_methods_are_listed_alike_whatever_was_imported_first():
    code = "import {}; from lightning_kv.policies.registry import presets; print(*presets())"
    first = (
        "lightning_kv",
        "lightning_kv.policies.budget.pyramid",
        "lightning_kv.calibration.clips",
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code.format(own)], capture_output=True, text=True, check=True
        ).stdout
        for own in first
    }
    assert len(told) == 1 and told.pop().split()[0] == "full"
