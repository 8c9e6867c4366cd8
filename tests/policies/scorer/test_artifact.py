"""A scorer in a file: the same scores when it is read again, and what is refused and said."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_kv.policies.head_curves import described
from lightning_kv.policies.registry import policy_from_dict, policy_to_dict
from lightning_kv.policies.scorer import artifact
from lightning_kv.policies.scorer.artifact import (
    PRIORS,
    Scorer,
    ScorerFile,
    check_model,
    prior_of,
    shipped_scorers,
)
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES, feature_hash
from lightning_kv.policies.scorer.students import STUDENTS
from lightning_kv.testing.tapes import random_tape
from lightning_kv.utilities.files import checksum

GEOMETRY = random_tape().geometry  # 2 layers of 3 heads, chunks of 3, a grid of 2 x 3


def trained(kind="mlp", embeddings=True, **about):
    """A scorer with weights of its own."""
    made = Scorer.fresh(kind, GEOMETRY, embeddings=embeddings, queries=7)
    rng = torch.Generator().manual_seed(2)
    for value in made.student.parameters():
        value.data.normal_(0, 0.3, generator=rng)
    made.student.standardise_by(*(torch.rand(n, generator=rng) + 0.5 for n in (29, 29, 6, 6)))
    model = {"name": "mine", "fingerprint": "sha256:1", "geometry": described(GEOMETRY)}
    return replace(made, about={"model": model, "data": {"prompts": ["a", "b"]}, **about})


@pytest.fixture
def path(tmp_path):
    trained().save(tmp_path / "scorer.safetensors")
    return tmp_path / "scorer.safetensors"


def given(count=5, places=6):
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, places, len(FEATURES), generator=rng),
        torch.randn(count, len(CONTEXT), generator=rng),
        torch.randint(2, (count,), generator=rng),
        torch.randint(3, (count,), generator=rng),
        torch.rand(count, places, generator=rng) < 0.7,
    )


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("embeddings", [True, False])
def test_a_file_says_the_same_as_what_was_written(tmp_path, kind, embeddings):
    made = trained(kind, embeddings, rounds=3)
    made.save(tmp_path / "one.safetensors")
    again = Scorer.load(tmp_path / "one.safetensors")
    assert torch.equal(made.scores(*given()), again.scores(*given()))
    assert (again.features, again.queries, again.about["rounds"]) == (made.features, 7, 3)
    assert again.prompts == ("a", "b")
    assert not any(x.requires_grad for x in again.student.parameters())
    again.save(tmp_path / "two.safetensors")
    assert checksum(tmp_path / "one.safetensors") == checksum(tmp_path / "two.safetensors")
    beside = json.loads((tmp_path / "one.json").read_text())
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lightning_kv"]) == beside
    assert beside["feature_hash"] == feature_hash(tuple(FEATURES))


def test_a_name_that_leaves_no_room_for_the_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written to .* such as scorer\.safetensors"):
        trained().save(tmp_path / "scorer.json")


# -- what is refused -------------------------------------------------------------------------


def rewritten(path, change=lambda tensors, about: None):
    """The file with something else in it."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lightning_kv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, about)
    save_file(tensors, path, {"lightning_kv": json.dumps(about)})


def other_hash(tensors, about):
    about["feature_hash"] = "0" * 16


def other_feature(tensors, about):
    about["features"][0] = "colour"


def other_format(tensors, about):
    about["format"] = "head-table"


def no_number(tensors, about):
    tensors["prior"][0] = torch.nan


def less(tensors, about):
    del tensors["prior"]


def another_kind(tensors, about):
    about["student"]["kind"] = "tree"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_hash, r"was taught on other definitions: its features \(0{16}\) .* Distil it again"),
        (other_feature, r"looks at colour: .* Distil it again"),
        (
            other_format,
            r"its format is 'head-table' 1\. It may be damaged, .*lightning-kv distill",
        ),
        (no_number, r"some of its weights are not finite\. It may be damaged"),
        (less, r"cannot be read as a scorer: .* It may be damaged"),
        (another_kind, r"No student 'tree'"),
    ],
)
def test_a_file_of_something_else_is_refused(path, change, said):
    rewritten(path, change)
    with pytest.raises(ValueError, match=said):
        Scorer.load(path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_was_cut_is_refused(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cannot be read as a scorer: .* It may be damaged"):
        Scorer.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for read in (Scorer.load, lambda path: ScorerFile.read(path, "scorer")):
        with pytest.raises(ValueError, match=r"No scorer at .*lightning-kv distill"):
            read(str(tmp_path / "nowhere.safetensors"))


def test_every_definition_is_in_the_hash(monkeypatch):
    names = ("age", "last-mass")
    own = feature_hash(names)
    assert own != feature_hash(names[::-1]) != feature_hash(names[:1])
    for table, name in ((FEATURES, "age"), (CONTEXT, "far")):
        monkeypatch.setitem(table, name, table[name].replace("1:", "2:"))
        assert feature_hash(names) != own
        monkeypatch.undo()
    monkeypatch.setitem(FEATURES, "trend", "2: another")
    assert feature_hash(names) == own


def test_what_a_student_begins_as_must_be_seen():
    assert prior_of("h2o", ("age", "total-mass")) == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"begins as 'h2o' looks at total-mass, .* Keep it, or"):
        prior_of("h2o", ("age",))
    with pytest.raises(ValueError, match=r"No prior 'h20'. Did you mean 'h2o'"):
        prior_of("h20", tuple(FEATURES))
    with pytest.raises(ValueError, match=r"No feature 'agee'. Did you mean 'age'"):
        Scorer.fresh("mlp", GEOMETRY, features=("agee",))
    assert {name for own in PRIORS.values() for name in own} <= FEATURES.keys()


# -- models ----------------------------------------------------------------------------------


def test_another_model_is_refused_or_said():
    made = trained()
    assert check_model(made, GEOMETRY, False) == ""
    assert check_model(made, replace(GEOMETRY, model="mine"), False) == ""
    said = check_model(made, replace(GEOMETRY, model="theirs"), False)
    assert "taught on the model 'mine' is used for 'theirs'" in said and "distil one" in said
    assert check_model(made, replace(GEOMETRY, head_dim=24), False) == ""
    for other in ({"layers": 4}, {"heads": 2}):
        with pytest.raises(
            ValueError, match=r"made for another model: 2 layers of 3 heads .* Give"
        ):
            check_model(made, replace(GEOMETRY, **other), True)
    for other in ({"chunk": 2}, {"grid": (3, 2)}):
        with pytest.raises(ValueError, match=r"scorer was taught with .* allow it"):
            check_model(made, replace(GEOMETRY, **other), False)
        assert check_model(made, replace(GEOMETRY, **other), True) == ""


def test_heads_that_it_knows_are_compared_though_the_file_says_nothing_of_them():
    made = replace(trained(), about={})
    with pytest.raises(ValueError, match="made for another model: 2 layers of 3 heads"):
        check_model(made, replace(GEOMETRY, layers=1), True)


def test_without_embeddings_it_can_be_tried_on_any_heads():
    made = trained(embeddings=False)
    assert check_model(made, replace(GEOMETRY, layers=9, heads=5, head_dim=6), False) == ""


def test_other_weights_are_said():
    made = trained()
    assert made.foreign("mine", "sha256:1") == made.foreign("", "") == ""
    assert "taught on other weights of 'mine' is used here" in made.foreign("mine", "sha256:2")
    assert "on the model 'mine' is used for 'theirs'" in made.foreign("theirs", "sha256:2")


def test_a_policy_says_it_when_it_meets_the_model(path):
    policy = policy_from_dict({"name": "x", "retain": {"part": "distilled", "scorer": str(path)}})
    with pytest.warns(UserWarning, match="taught on the model 'mine' is used for 'theirs'"):
        policy.check(replace(GEOMETRY, model="theirs"), 3, 24)


# -- files as settings -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part"), [("retain", "distilled"), ("select", "distilled-reads")])
def test_a_policy_with_a_file_survives_plain_data(path, kind, part):
    made = policy_from_dict({"name": "x", kind: {"part": part, "scorer": path.name}}, path.parent)
    told = json.loads(json.dumps(policy_to_dict(made)))
    assert policy_from_dict(told) == made
    own = getattr(made, kind).scorer
    assert (own.file, own.sha256) == (path.name, checksum(path))
    assert ScorerFile.of(asdict(own)) == own and hash(own) == hash(ScorerFile.of(str(path)))


def test_a_file_that_has_changed_since_is_refused(path, tmp_path):
    own = ScorerFile.read(path, "scorer")
    told = asdict(own)
    trained("linear").save(path)
    with pytest.raises(ValueError, match=r"is no longer the file that was meant: .* Give the file"):
        ScorerFile.of(told)
    with pytest.raises(ValueError, match="is no longer the file that was meant"):
        own.scorer(GEOMETRY)


def test_a_file_is_read_once(path, monkeypatch):
    own, again = ScorerFile.read(path, "scorer"), ScorerFile.read(str(path), "scorer")
    first = own.scorer(GEOMETRY)
    monkeypatch.setattr(Scorer, "load", None)
    assert own.scorer(GEOMETRY) is again.scorer(GEOMETRY) is first


def test_what_is_shipped_is_found_by_the_name_of_the_model(panorama):
    geometry = panorama.network.geometry()
    shipped = ScorerFile().scorer(geometry)
    assert shipped.about["model"]["name"] == "panorama" == geometry.model
    assert check_model(shipped, geometry, False) == ""
    assert ScorerFile().scorer(geometry) is shipped
    for model in ("", "theirs"):
        whose = "'theirs'" if model else "without a name"
        with pytest.raises(
            ValueError, match=rf"No scorer is shipped for .*{whose}.* give its path"
        ):
            ScorerFile().scorer(replace(geometry, model=model))


def test_the_mark_of_auto_is_that_of_all_that_are_shipped(tmp_path, monkeypatch):
    own = ScorerFile().sha256
    (shipped,) = shipped_scorers().values()
    shutil.copy(shipped, tmp_path / "other.safetensors")
    shutil.copy(shipped, tmp_path / shipped.name)
    monkeypatch.setattr(artifact, "SCORERS", tmp_path)
    for kept in (artifact.shipped_scorers, artifact._digest):
        kept.cache_clear()
    try:
        assert ScorerFile().sha256 != own
    finally:
        monkeypatch.undo()
        for kept in (artifact.shipped_scorers, artifact._digest):
            kept.cache_clear()
    assert ScorerFile().sha256 == own
