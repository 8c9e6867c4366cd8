"""What lies at an address: found in the current folder, and said where it is not."""

import sys

import pytest

from lightning_kv.utilities.addresses import divided, file_of, foreign, imported


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "addressed").mkdir()
    (tmp_path / "addressed" / "mine.py").write_text("class Glow:\n    class Deep:\n        pass\n")
    (tmp_path / "addressed" / "broken.py").write_text("\n\n1 / 0\n")
    (tmp_path / "addressed" / "leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "addressed"]:
        del sys.modules[name]


def test_both_ways_of_writing_lead_to_the_same(here):
    one = imported("addressed.mine:Glow", "The thing")
    assert one is imported("addressed.mine.Glow", "The thing") and one.__name__ == "Glow"
    assert imported("addressed.mine:Glow.Deep", "The thing") is one.Deep
    assert imported("addressed.mine:Absent", "The thing") is None
    assert file_of("addressed.mine") == here / "addressed" / "mine.py"
    assert foreign("addressed.mine") and not foreign("lightning_kv.rollout") and not foreign("abc")


def test_the_current_folder_is_searched_last_and_only_while_it_is_needed(here):
    before = list(sys.path)
    imported("json:loads", "The thing")
    assert sys.path == before
    imported("addressed.mine:Glow", "The thing")
    assert sys.path == [*before, str(here)]  # what came from here may import more later


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("addressed/mine.py:Glow", "is no address of a class. Give A:B, such as"),
        ("addressed.mine.py:Glow", "is no address of a class"),
        ("addressed.mine:", "is no address of a class"),
        ("word", "is no address of a class"),
        ("addressed.none:Glow", "cannot be imported: ModuleNotFoundError: No module named"),
        ("addressed.broken:Glow", "broken.py:3). Give A:B, installed or in the current folder."),
        ("addressed.leaves:Glow", "cannot be imported: SystemExit: 3 ("),
    ],
)
def test_what_leads_nowhere_is_said_in_three_parts(here, address, said):
    with pytest.raises(ValueError) as error:
        imported(address, "The thing", "A:B")
    text = str(error.value)
    assert text.startswith(f"The thing {address!r} ") and said in text and "\n" not in text


def test_an_address_without_a_module():
    assert divided("word") == ("", "word")
