"""Features on disk, and the distances that come of them."""

import json
import math

import pytest
import torch

from lightning_kv.metrics.backbones.base import RandomBackbone
from lightning_kv.metrics.frechet import frechet_distance
from lightning_kv.metrics.frechet_difference import delta_frechet
from lightning_kv.metrics.suite import Suite
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.tasks.featured import (
    distances,
    featured,
    policy_folder,
    read_features,
    read_real,
    real_folder,
    real_videos,
    write_features,
)
from lightning_kv.tasks.recording import latents_path

FACTS = {"fvd/random-3dconv": {"encoder": "random-3dconv", "frames": 8}}
NAME = "fvd/random-3dconv"


def rows(seed, n=2, width=4):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def keep(run, policy, clips):
    """Write the features of some clips; ``policy`` None for the real set."""
    folder = real_folder(run) if policy is None else policy_folder(run, policy)
    for key, found in clips.items():
        write_features(folder, key, {"random-3dconv": found})


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


ODD = [
    "a/b",
    "a_b",
    "a__b",
    "a b",
    "a:b",
    "..",
    ".",
    ".a",
    "_a",
    "é",
    "e",
    "日本",
    "x" * 200,
    "A-b",
]


def test_names_that_differ_stay_apart(run):
    folders = [policy_folder(run, name) for name in ODD]
    assert len(set(folders)) == len(ODD)
    assert {folder.parent for folder in folders} == {run.features / "policies"}
    assert len({latents_path(run, name, "k").parent for name in ODD}) == len(ODD)
    for place, key in enumerate(ODD):
        keep(run, "mine", {key: rows(place, 1)})
    assert all(featured(policy_folder(run, "mine"), key) for key in ODD)
    found, keys = read_features(policy_folder(run, "mine"), "random-3dconv")
    assert len(found) == len(set(keys)) == len(ODD)
    assert policy_folder(run, "focused-forcing@9f").name == "focused-forcing@9f"


def test_policies_with_names_that_look_alike_are_not_mixed(run):
    base = {f"k{i}": rows(i) for i in range(6)}
    keep(run, "full", base)
    keep(run, "a/b", {key: each + 1 for key, each in base.items()})
    keep(run, "a_b", {key: each + 3 for key, each in base.items()})
    found = distances(run, FACTS, ["full", "a/b", "a_b"], "full")
    # equal spread: what is left is the squared distance of the means, 4 numbers each
    assert found["a/b"][NAME]["mean"] == pytest.approx(4, rel=1e-5)
    assert found["a_b"][NAME]["mean"] == pytest.approx(36, rel=1e-5)
    assert found["full"] == {}


def test_with_a_real_set_all_are_compared_with_it(run):
    clips = {f"k{i}": rows(i) for i in range(7)}
    keep(run, "full", clips)
    keep(run, "a", {key: each + 2 for key, each in list(clips.items())[::-1]})
    keep(run, None, {f"r{i}": rows(50 + i) for i in range(7)})
    found = distances(run, FACTS, ["full", "a"], "full")
    sets = {name: torch.cat([c + d for c in clips.values()]) for name, d in (("full", 0), ("a", 2))}
    real = torch.cat([rows(50 + i) for i in range(7)])
    for name, own in sets.items():
        result = found[name][NAME]
        assert result["mean"] == pytest.approx(frechet_distance(own, real).item())
        assert (result["n"], result["n_real"], result["prompts"]) == (14, 14, 7)
        assert result["against"] == "the real set"
    ids = torch.arange(7).repeat_interleave(2)
    direct = delta_frechet(sets["a"], sets["full"], real, ids)
    paired = found["a"][NAME]["paired"]
    assert found["full"][NAME]["paired"] is None
    assert paired["difference"] == pytest.approx(direct.value)
    assert (paired["p"], paired["n"]) == (direct.p_value, 7)
    assert paired["ci95"][0] < paired["difference"] < paired["ci95"][1]
    json.dumps(found, allow_nan=False)


def test_clips_are_paired_with_those_of_their_prompt(run):
    """As many windows in all, but not of every prompt: those that differ are left out."""
    same = {f"k{i}": rows(i) for i in range(5)}
    keep(run, "full", same | {"x": rows(20, 1), "y": rows(21, 3)})
    keep(run, "a", {k: v + 1 for k, v in same.items()} | {"x": rows(30, 3), "y": rows(31, 1)})
    keep(run, None, {f"r{i}": rows(50 + i) for i in range(7)})
    paired = distances(run, FACTS, ["full", "a"], "full")["a"][NAME]["paired"]
    own, base = (torch.cat([rows(i) + add for i in range(5)]) for add in (1, 0))
    real = torch.cat([rows(50 + i) for i in range(7)])
    direct = delta_frechet(own, base, real, torch.arange(5).repeat_interleave(2))
    assert paired["n"] == 5 and paired["difference"] == pytest.approx(direct.value)


@pytest.mark.parametrize("common", [0, 1])
def test_without_two_common_prompts_there_is_no_pair(run, common):
    keep(run, "full", {f"k{i}": rows(i) for i in range(5)})
    keep(run, "a", {f"k{i + 5 - common}": rows(i) for i in range(5)})
    keep(run, None, {f"r{i}": rows(50 + i) for i in range(7)})
    result = distances(run, FACTS, ["full", "a"], "full")["a"][NAME]
    assert result["mean"] is not None and result["paired"] is None


BROKEN = {
    "NaN": {"k0": torch.full((3, 4), math.nan), "k1": rows(1)},
    "infinite": {"k0": torch.full((3, 4), math.inf), "k1": rows(1)},
    "constant": {f"k{i}": torch.ones(2, 4) for i in range(3)},
    "one": {"k0": rows(0, 1)},
    "none": {},
    "too short": {"k0": torch.empty(0, 4)},
    "wide": {f"k{i}": rows(i, 2, 5) for i in range(3)},
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("who", ["full", "a", "real"])
def test_what_has_no_distance_has_a_status(run, kind, who):
    good = {f"k{i}": rows(i + 9) for i in range(3)}
    sets = dict.fromkeys(("full", "a", "real"), good) | {who: BROKEN[kind]}
    keep(run, "full", sets["full"])
    keep(run, "a", sets["a"])
    if who == "real":
        keep(run, None, sets["real"])
    found = distances(run, FACTS, ["full", "a"], "full")
    json.dumps(found, allow_nan=False)
    result = found["a"][NAME]
    if who == "real" and kind in ("none", "too short"):
        assert result["against"] == "the clips of full"  # there is no real set then
    else:
        assert result["mean"] is None and result["status"].startswith("no value: ")
        assert result["n"] == sum(map(len, sets["a"].values()))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_reference_without_a_distance_takes_none_away(run, kind):
    good = {f"k{i}": rows(i) for i in range(4)}
    keep(run, "full", BROKEN[kind])
    keep(run, "a", good)
    keep(run, None, {f"r{i}": rows(50 + i) for i in range(4)})
    found = distances(run, FACTS, ["full", "a"], "full")
    real = torch.cat([rows(50 + i) for i in range(4)])
    own = found["a"][NAME]
    assert own["mean"] == pytest.approx(frechet_distance(torch.cat([*good.values()]), real).item())
    assert own["paired"] is None and found["full"][NAME]["mean"] is None
    assert found["full"][NAME]["status"].startswith("no value: ")


def test_a_damaged_file_is_said(run):
    keep(run, "full", {"k": rows(0)})
    keep(run, "a", {"k": rows(0)})
    path = policy_folder(run, "a") / "k.npz"
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:-40], whole[:60], b"PK\3\4" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"k\.npz cannot be read as features of random-3dconv"):
            distances(run, FACTS, ["full", "a"], "full")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="cannot be read as features of other"):
        read_features(path.parent, "other")


def test_an_unavailable_metric_is_left_alone(run):
    keep(run, "full", {"k": rows(0)})
    assert distances(run, {"fvd/i3d": {"encoder": None}}, ["full"], "full") == {"full": {}}


def test_real_videos_are_read_once(run, tmp_path, video, monkeypatch):
    folder = tmp_path / "real"
    for seed, key in enumerate(("a", "in/a", "in__a", "deep/er/b")):
        video(folder / f"{key}.mp4", seed, frames=17)
    (folder / "notes.txt").write_text("no video")
    encoder, suite = RandomBackbone(3), Suite([NAME], {"pixels"})
    found = real_videos(folder, suite)
    assert sorted(found) == ["a", "deep/er/b", "in/a", "in__a"]
    read_real(run, found, {encoder.name: encoder})
    features, keys = read_features(real_folder(run), encoder.name)
    assert features.shape == (8, 32) and len(set(keys)) == 4
    monkeypatch.setattr("lightning_kv.tasks.featured.read", None)
    read_real(run, found, {encoder.name: encoder})
    video(folder / "a.mkv", 1)
    with pytest.raises(ValueError, match="Two videos have one name"):
        real_videos(folder, suite)
    assert real_videos(None, suite) == {}
