"""Lists on disk and in batches: each is seen once or drawn by its weight, by any processes."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from made_records import MADE, clip_lists, made_rounds, sample

from lightning_kv.distillation.clips import ClipLists
from lightning_kv.distillation.lists import column_moments, concatenated
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.tasks.calibration.records import Wanted
from lightning_kv.tasks.distillation.data import StatisticsData, chosen
from lightning_kv.tasks.distillation.records import ListDirectory, read_lists


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_rounds(tmp_path_factory.mktemp("rounds"))


class Place:
    """A Trainer, as far as data ask it."""

    def __init__(self, rank, world, step=0):
        self.global_rank, self.world_size, self.global_step = rank, world, step


def placed(folders, rank, world, step=0, **settings):
    data = StatisticsData(folders, **({"steps": 8, "batch": 13, "look": 5} | settings))
    data.trainer = Place(rank, world, step)
    return data


def rows(lists):
    """Each list by what is in it."""
    return [tuple(own.tolist()) for own in lists.context]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2), (2, 3), (7, 1)])
def test_each_held_out_list_is_seen_once(folders, world, workers):
    seen = Counter()
    for rank in range(world):
        for lists in placed(folders, rank, world, workers=workers).val_dataloader():
            assert 0 < len(lists) <= 5
            seen.update(rows(lists))
    held = [clip_lists(104), clip_lists(105)]
    assert seen == Counter(row for own in held for row in rows(own))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_is_the_same_from_wherever_it_is_begun_and_on_however_many_ranks(folders, workers):
    whole = list(placed(folders, 0, 1).train_dataloader())
    assert len(whole) == 8 and all(len(own.lists) == 13 for own in whole)
    later = list(placed(folders, 0, 1, step=5, workers=workers).train_dataloader())
    assert len(later) == 3
    for one, other in zip(whole[5:], later, strict=True):
        assert rows(one.lists) == rows(other.lists) and torch.equal(one.k, other.k)
    parts = [list(placed(folders, r, 3, workers=workers).train_dataloader()) for r in range(3)]
    for step, own in enumerate(whole):
        slices = [part[step] for part in parts]
        together = Counter(row for part in slices for row in rows(part.lists))
        assert together == Counter(rows(own.lists))
        total = sum(float((part.lists.weight / part.total).sum()) for part in slices) / 3
        assert total == pytest.approx(1)  # the mean over ranks of sums is the mean over lists


def test_the_newest_round_is_drawn_more_often(folders):
    data = placed(folders, 0, 1, batch=20_000, newest=3.0)
    old = {row for n in range(4) for row in rows(clip_lists(n))}
    seen = rows(data.drawn(0).lists)
    new = {row for n in range(4) for row in rows(clip_lists(100 + n))}
    assert set(seen) == old | new
    share = sum(row in new for row in seen) / len(seen)
    assert share == pytest.approx(3 * len(new) / (3 * len(new) + len(old)), abs=0.01)


def test_how_many_are_kept_is_their_own_number_or_any():
    lists = clip_lists(3, count=400)
    count = lists.candidate.sum(-1)
    chance = torch.linspace(0, 1 - 1e-9, len(lists), dtype=torch.float64)
    own = chosen(lists, torch.ones(len(lists), dtype=torch.bool), chance)
    assert torch.equal(own, torch.minimum(lists.keep.clamp_min(1), count - 1))
    wide = chosen(lists, torch.zeros(len(lists), dtype=torch.bool), chance)
    assert bool((wide >= 1).all()) and bool((wide < count).all())
    many = clip_lists(4).select(slice(0, 1))
    many = concatenated([many] * 4000)
    n = int(many.candidate[0].sum())
    chance = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = chosen(many, torch.zeros(4000, dtype=torch.bool), chance)
    for k in range(1, n):  # k, where its logarithm is uniform from 0 to log n
        wanted = torch.log(torch.tensor((k + 1) / k)) / torch.log(torch.tensor(float(n)))
        assert float((found == k).float().mean()) == pytest.approx(float(wanted), abs=0.03)


def test_columns_are_those_of_the_lists_to_learn(folders):
    data = placed(folders, 0, 1)
    learned = concatenated([clip_lists(100 * r + n) for r in range(2) for n in range(4)])
    for found, wanted in zip(data.moments(), column_moments(learned), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_record_is_what_was_written_and_some_may_be_asked_for(folders):
    found = read_lists(folders[0], held_out=False)
    wanted = concatenated([clip_lists(n) for n in range(4)])
    sizes = [len(clip_lists(n)) for n in range(4)]
    assert found.lists.clip.tolist() == [n for n in range(4) for _ in range(sizes[n])]
    for name in ("features", "candidate", "target", "gram", "keep", "weight"):
        assert torch.equal(getattr(found.lists, name), getattr(wanted, name)), name
    assert found.made["round"] == 0 and found.clips == 4
    assert read_lists(folders[0], keys={"p1", "p5"}).clips == 2
    data = StatisticsData(folders, 4, keys={"p0", "p4"})
    assert len(data.taught[0]) == sizes[0] + len(clip_lists(100)) and data.outputs
    assert data.held_out.clips == 1


def test_clips_that_nothing_was_dropped_in_are_records_too(tmp_path):
    run = ListDirectory(tmp_path / "round-0", MADE)
    run.open("mark", {})
    run.write(ClipLists("p0", "p0", False, None, 9, 6), sample(0))
    assert read_lists(run.path).lists is None and read_lists(run.path).clips == 1
    with pytest.raises(ValueError, match="no clip had to drop a frame"):
        _ = StatisticsData([run.path], 4).taught
    wanted = {"p0": Wanted(sample(0), False)}
    assert run.finished(wanted) == {"p0"}
    assert run.finished({"p0": Wanted(sample(0), True)}) == set()  # held out: another rollout


def test_records_that_cannot_be_used_are_refused(tmp_path, folders):
    with pytest.raises(ValueError, match="no records of clips: 0 files"):
        read_lists(tmp_path)
    (other,) = made_rounds(tmp_path, 1, made=MADE | {"feature_hash": "another"})
    with pytest.raises(ValueError, match="holds other features than this version has: another"):
        read_lists(other)
    (wide,) = made_rounds(tmp_path / "wide", 1, made=MADE | {"layers": 9})
    with pytest.raises(ValueError, match="models of different sizes"):
        _ = StatisticsData([folders[0], wide], 4).taught
    (judged,) = made_rounds(tmp_path / "judged", 1, made=MADE | {"teacher": {"target": "mass-now"}})
    with pytest.raises(ValueError, match=r"different ways: teacher is not told of some and .*Put"):
        _ = StatisticsData([folders[0], judged], 4).taught
    shutil.copy(judged / "clips/p3.safetensors", tmp_path / "p3")  # of another machine
    (mixed,) = made_rounds(tmp_path / "mixed", 1)
    shutil.copy(tmp_path / "p3", mixed / "clips/p3.safetensors")
    with pytest.raises(ValueError, match="different ways: teacher is not told of some"):
        read_lists(mixed)
    with pytest.raises(ValueError, match="There is nothing to learn: 1 folders, steps=0"):
        StatisticsData(folders[:1], 0)
    next((wide / "clips").iterdir()).write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        read_lists(wide)


def test_features_have_the_width_of_the_records(folders):
    assert read_lists(folders[0]).lists.features.shape[-1] == len(FEATURES)
