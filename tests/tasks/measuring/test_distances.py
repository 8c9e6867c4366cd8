"""Features on disk, and the distances that come of them."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from lightning_kv.cache.session import Cost
from lightning_kv.data.make_shards import make_video_shards
from lightning_kv.metrics.backbones.base import RandomBackbone
from lightning_kv.metrics.functional.frechet import frechet_distance, frechet_error
from lightning_kv.metrics.functional.frechet_difference import delta_frechet
from lightning_kv.metrics.suite import Suite, set_metric
from lightning_kv.metrics.windows import WindowEncoder
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.features import FeatureStore, part_of_path
from lightning_kv.tasks.callbacks import RecordWriter
from lightning_kv.tasks.measuring import real_videos as real
from lightning_kv.tasks.measuring.adapter import Measured
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.measuring.distances import distances
from lightning_kv.tasks.measuring.real_videos import encode_real, on_disk, real_videos
from lightning_kv.tasks.rollouts.outcome import cost

NAME = "fvd/random-3dconv"
RECIPE = set_metric(NAME, num_features=4, features_name="random-3dconv", frames=8).recipe
COUNTS = ("n", "clips", "windows", "n_real", "clips_real", "windows_real")
FACTS = {NAME: {"encoder": "random-3dconv", "frames": 8, "recipe": RECIPE}}


def rows(seed, n=2, width=4):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def keep(run, policy, clips):
    """Write the features of some clips; ``policy`` None for the real set."""
    for key, found in clips.items():
        FeatureStore(run.features).write(policy, key, {"random-3dconv": found.numpy()})


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
    assert len({part_of_path(name) for name in ODD}) == len(ODD)
    for place, key in enumerate(ODD):
        keep(run, "mine", {key: rows(place, 1)})
        keep(run, key, {"k": rows(place, 1)})
    store = FeatureStore(run.features)
    assert all(store.has("mine", key) and store.has(key, "k") for key in ODD)
    assert len(list((run.features / "policies").iterdir())) == len(ODD) + 1
    found, keys = store.rows("mine", "random-3dconv")
    assert len(found) == len(set(keys)) == len(ODD)
    for place, key in enumerate(ODD):
        assert (store.read("mine", key)["random-3dconv"] == rows(place, 1).numpy()).all()
    assert store.read("mine", "nobody") is None
    assert part_of_path("focused-forcing@9f") == "focused-forcing@9f"


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
    keep(run, None, {"r7": rows(57, 3)})
    found = distances(run, FACTS, ["full", "a"], "full")
    sets = {name: torch.cat([c + d for c in clips.values()]) for name, d in (("full", 0), ("a", 2))}
    real = torch.cat([*(rows(50 + i) for i in range(7)), rows(57, 3)])
    for name, own in sets.items():
        result = found[name][NAME]
        assert result["mean"] == pytest.approx(frechet_distance(own, real).item())
        assert [result[each] for each in COUNTS] == [7, 7, 14, 8, 8, 17]
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


def sampled(run, prompts, samples):
    """Features of three sets, so many samples of each prompt, and the records that say so."""
    run.open("-", {}, {"reference": "full"})
    keys = {
        f"p{i}" + (f"#{s}" if s else ""): f"p{i}" for i in range(prompts) for s in range(samples)
    }
    for name, shift in (("full", 0), ("a", 1), (None, 0)):
        keep(
            run,
            name,
            {k: rows(9 * i + (50 if name is None else 0)) + shift for i, k in enumerate(keys)},
        )
    for key, unit in keys.items():
        cost = {"seconds_per_chunk": []}
        clip = {"policy": "a", "key": key, "unit": unit, "prompt": "-", "cost": cost}
        run.append(0, clip | {"metrics": {}, "curves": {}})
    return list(keys)


def test_samples_of_a_prompt_are_left_out_and_swapped_together(run):
    """Seven prompts of three samples: the same as calls with the prompt of every clip."""
    keys = sampled(run, 7, 3)
    found = distances(run, FACTS, ["full", "a"], "full")["a"][NAME]
    assert [found[each] for each in COUNTS] == [7, 21, 42, 7, 21, 42]
    order = sorted(keys)  # that of the files
    ids = torch.tensor([int(key[1]) for key in order]).repeat_interleave(2)
    base = torch.cat([rows(9 * keys.index(key)) for key in order])
    real = torch.cat([rows(9 * keys.index(key) + 50) for key in order])
    assert found["mean"] == pytest.approx(frechet_distance(base + 1, real).item())
    assert found["se"] == pytest.approx(frechet_error(base + 1, real, "unbiased", ids))
    direct = delta_frechet(base + 1, base, real, ids)
    paired = found["paired"]
    assert [paired[each] for each in ("n", "clips", "p")] == [7, 21, direct.p_value]
    assert paired["difference"] == pytest.approx(direct.value)
    arm = stats.t.ppf(0.975, 6) * direct.standard_error
    assert paired["ci95"] == pytest.approx([direct.value - arm, direct.value + arm])


@pytest.mark.parametrize("prompts", [2, 3, 5])
def test_few_prompts_have_no_interval_however_many_samples(run, prompts):
    sampled(run, prompts, 6)
    paired = distances(run, FACTS, ["full", "a"], "full")["a"][NAME]["paired"]
    assert (paired["n"], paired["clips"], paired["ci95"]) == (prompts, 6 * prompts, None)
    assert paired["p"] >= 2.0 ** (1 - prompts)


def test_six_samples_of_one_prompt_are_no_test_of_sets(run):
    sampled(run, 1, 6)
    found = distances(run, FACTS, ["full", "a"], "full")["a"][NAME]
    assert (found["n"], found["clips"], found["se"], found["paired"]) == (1, 6, None, None)
    assert found["mean"] is not None


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
        assert result["windows"] == sum(map(len, sets["a"].values()))


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
    path = run.features / "policies" / "a" / "k.npz"
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:-40], whole[:60], b"PK\3\4" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"k\.npz cannot be read as features of clips"):
            distances(run, FACTS, ["full", "a"], "full")
    path.write_bytes(whole)
    assert FeatureStore(run.features).rows("a", "other")[1] == [], "it judged no clip"


def test_an_unavailable_metric_is_left_alone(run):
    keep(run, "full", {"k": rows(0)})
    assert distances(run, {"fvd/i3d": {"encoder": None}}, ["full"], "full") == {"full": {}}


def test_real_videos_are_read_once(run, tmp_path, video, monkeypatch):
    folder = tmp_path / "real"
    for seed, key in enumerate(("a", "in/a", "in__a", "deep/er/b")):
        video(folder / f"{key}.mp4", seed, frames=17)
    (folder / "notes.txt").write_text("no video")
    encoder, suite = WindowEncoder(RandomBackbone(3)), Suite([NAME], {"pixels"})
    found = real_videos(folder, suite)
    assert sorted(found) == ["a", "deep/er/b", "in/a", "in__a"]
    store, encoders = FeatureStore(run.features), {encoder.name: encoder}
    first = {key: encode_real(key, path, encoders, store) for key, path in found.items()}
    features, keys = store.rows(None, encoder.name)
    assert features.shape == (8, 32) and len(set(keys)) == 4
    monkeypatch.setattr("lightning_kv.tasks.measuring.real_videos.read", None)
    for key, path in found.items():
        again = encode_real(key, path, encoders, store)
        assert torch.equal(again[encoder.name], first[key][encoder.name])
    video(folder / "a.mkv", 1)
    with pytest.raises(ValueError, match="Two videos have one name"):
        real_videos(folder, suite)
    assert real_videos(None, suite) == {}


def test_a_metric_that_was_made_in_another_way_is_not_computed_here(run):
    for name in ("full", "a"):
        keep(run, name, {f"k{i}": rows(i) for i in range(6)})
    facts = FACTS[NAME] | {"recipe": RECIPE.replace("unbiased covariance", "ml covariance")}
    found = distances(run, {NAME: facts}, ["full", "a"], "full")["a"][NAME]
    assert found["mean"] is None and "ml covariance" in found["status"]


def clip_of(name, key, unit, features):
    """A clip of which nothing but features is known."""
    return ClipResult(name, key, unit, unit, Measured({}, {}, features))


def test_states_of_sets_count_prompts_whatever_the_samples():
    """Two prompts of two samples: four clips on both sides, two units."""
    suite = Suite([NAME], {"pixels"})
    module = ClipModule(suite, ["full", "a"], "full")
    for place, key in enumerate(("p", "p#1", "q", "q#1")):
        for name, shift in (("full", 0), ("a", 50)):
            features = {suite.encoder_of(NAME): rows(place + shift, 2, 32)}
            module.add(clip_of(name, key, key[0], features))
    found = module.sets_of("a")[NAME].report()
    assert (found.n, found.units, found.windows) == (4, 2, 8)
    assert (found.n_real, found.units_real, found.windows_real) == (4, 2, 8)


def test_reads_and_scored_keys_are_shares_of_what_the_reference_reads():
    """The counts of all four kinds differ, so that no other quotient gives these numbers."""

    def rollouts(*counts):
        costs = [Cost(read, scored, 9999, [7, 9], 11) for read, scored in counts]
        return SimpleNamespace(costs=costs, seconds_per_chunk=[0.5])

    own, base = rollouts((5, 7), (30, 60)), rollouts((11, 13), (120, 17))
    found = cost(own, base, 1)
    assert (found["kv_read_fraction"], found["kv_scored_fraction"]) == (30 / 120, 60 / 120)
    assert (found["kv_rows_read"], found["kv_rows_scored"]) == (30, 60)
    assert (found["kv_bytes_peak"], found["kv_bytes_mean"]) == (11, 8)
    full = cost(base, base, 0)
    assert (full["kv_read_fraction"], full["kv_scored_fraction"]) == (1, 13 / 11)
    nothing = cost(own, rollouts((0, 3), (0, 3)), 0)
    assert nothing["kv_read_fraction"] is nothing["kv_scored_fraction"] is None


TWO = FACTS | {"kvd/other": FACTS[NAME] | {"encoder": "other"}}


def test_a_clip_that_one_of_two_encoders_refuses_counts_for_the_other(run, monkeypatch):
    """Its file lacks that encoder, and that of a clip that both refuse holds nothing."""
    store, seen = FeatureStore(run.features), {}
    clips = {f"k{i}": rows(i) for i in range(6)}
    for name, shift in (("full", 0), ("a", 2)):
        for key, found in clips.items():
            kept = {"random-3dconv": found.numpy() + shift, "other": found.numpy() + 9}
            if key == "k0":
                del kept["other"]
            store.write(name, key, kept)
        store.write(name, "refused", {})
    assert store.has("a", "refused") and store.read("a", "refused") == {}

    def noted(name, facts, own, *others):
        seen[name, len(seen)] = own
        return {"windows": len(own[0])}

    monkeypatch.setattr("lightning_kv.tasks.measuring.distances.distance", noted)
    distances(run, TWO, ["full", "a"], "full")
    monkeypatch.undo()
    by_name = {name: own for (name, _), own in seen.items()}
    assert sorted(set(by_name[NAME][1])) == sorted(clips)
    assert sorted(set(by_name["kvd/other"][1])) == sorted(set(clips) - {"k0"})
    result = distances(run, FACTS, ["full", "a"], "full")["a"][NAME]
    assert (result["n"], result["n_real"]) == (6, 6)
    assert result["mean"] == pytest.approx(4 * 4, rel=1e-4), "4 numbers, each 2 further"


@pytest.mark.parametrize("features", [{}, {"other": rows(0)}])
def test_a_clip_that_an_encoder_refused_is_finished(tmp_path, features):
    """A run that is taken up again does not roll it out for features that cannot be had."""
    writer = RecordWriter(tmp_path / "run")
    writer.there, writer.failed, writer.firsts = {("full", "k"), ("a", "k")}, set(), frozenset("k")
    writer.wanted = lambda key: ["full", "a"]
    module = SimpleNamespace(encoders={"e": None, "other": None}, real={}, shows_truth=False)
    module.reference_name = "full"
    assert writer.lacking(None, module, ["k"]) == {"k"}
    for name in ("full", "a"):
        clips = {"clips": [clip_of(name, "k", "k", features)]}
        writer.on_test_batch_end(SimpleNamespace(global_rank=0), module, clips)
    assert writer.lacking(None, module, ["k"]) == set()


def test_real_videos_of_shards_have_the_features_of_their_folder(tmp_path, video, monkeypatch):
    """Each shard is looked through once, and no video is copied out of it."""
    for seed, key in enumerate(("a", "b", "in/a", "d")):
        video(tmp_path / f"real/{key}.mp4", seed, frames=17)
    make_video_shards(tmp_path / "real", tmp_path / "shards", "set", shard_videos=2)
    (tmp_path / "shards/._set-000000.tar").write_bytes(b"Mac OS X")
    encoder, suite = WindowEncoder(RandomBackbone(3)), Suite([NAME], {"pixels"})
    opened = []
    listed = real.members
    monkeypatch.setattr(real, "members", lambda shard: opened.append(shard.name) or listed(shard))
    monkeypatch.setattr("tempfile.mkdtemp", None)
    features = []
    for folder in (tmp_path / "real", tmp_path / "shards"):
        found = real_videos(folder, suite)
        encoded = [encode_real(key, each, {"e": encoder}, None)["e"] for key, each in found.items()]
        features.append(torch.cat(encoded))
        assert {on_disk(each).suffix for each in found.values()} == {
            ".mp4" if folder.name == "real" else ".tar"
        }
    assert torch.equal(*features) and len(features[0]) == 8
    assert opened == ["set-000000.tar", "set-000001.tar"]
    assert next(iter(found)) == "set-000000::a.mp4"


@pytest.mark.parametrize(
    "content",
    [b"", b"<html></html>", gzip.compress(bytes(10240), mtime=0)],  # else a name holds the second
    ids=["empty", "html", "gzip"],
)
def test_real_shards_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"no whole, uncompressed tar\. Given "):
        real_videos(tmp_path, Suite([NAME], {"pixels"}))
