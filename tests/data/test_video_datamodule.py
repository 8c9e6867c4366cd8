"""Videos for models: every clip once, in an order that does not depend on who reads it."""

import os
from itertools import chain
from types import SimpleNamespace
from unittest import mock

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.data import video_clips
from lightning_kv.data.check_shards import check_shards
from lightning_kv.data.datamodule import (
    PromptDataModule,
    VideoClip,
    VideoDataModule,
    VideoPairDataModule,
    balanced,
    distribution,
)
from lightning_kv.data.make_shards import make_video_shards
from lightning_kv.data.pairs import pair_folders
from lightning_kv.data.shards import write_prompt_shards
from lightning_kv.data.video_clips import Cut, clips_of, find_videos
from lightning_kv.data.video_pairs import joined
from lightning_kv.data.videos import VideoError, read


def place(data, rank=0, world=1):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=None)
    return data


def by_hand(data, world, workers, loader="test_dataloader"):
    """Items of every worker of every rank, read in this process as a data loader would."""
    found = {}
    for rank in range(world):
        stream = getattr(place(data, rank, world), loader)().dataset
        for number in range(workers):
            info = SimpleNamespace(id=number, num_workers=workers)
            with mock.patch.object(distribution, "get_worker_info", return_value=info):
                found[rank, number] = list(stream)
    return found


def ordered(part, whole):
    """Whether what was seen is in the order of the set."""
    numbers = [whole.index(key) for key in part]
    return numbers == sorted(set(numbers))


def pretend(video):
    """A member of n bytes is a video of n frames."""
    return SimpleNamespace(frames=video.size, fps=8)


def pictures(info, block, size):
    yield from (torch.full((1, 1, 1, 1), at, dtype=torch.uint8) for at in range(info.frames))


@settings(deadline=None)
@given(st.data())
def test_every_clip_of_random_shards_is_read_once(tmp_path_factory, tar, vouch, data):
    """Any shards, ranks, workers, clips and finished sets; lengths by plain arithmetic."""
    shards = data.draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1,
                                max_size=6), "frames of the videos of the shards")  # fmt: skip
    world, workers = data.draw(st.integers(1, 5), "ranks"), data.draw(st.integers(1, 3), "workers")
    length = data.draw(st.none() | st.integers(1, min(map(min, shards))), "length")
    stride = data.draw(st.integers(1, 9), "stride") if length else None
    folder = tmp_path_factory.mktemp("set")
    expected, home = [], {}
    for number, sizes in enumerate(shards):
        names = [f"s{number}-{at}" for at in range(len(sizes))]
        files = dict(zip(names, sizes, strict=True))
        tar(folder / f"set-{number}.tar", [(f"{n}.mp4", bytes(s)) for n, s in files.items()])
        for name, size in files.items():
            fits = [at for at in range(size) if length and at + length <= size]
            starts = [at for at in fits if not at % stride]
            own = [f"{name}@{at}" for at in starts] if length else [name]
            expected += own
            home |= dict.fromkeys(own, number)
    vouch(folder, list(map(len, shards)))
    finished = data.draw(st.sets(st.sampled_from(expected)), "finished")
    module = VideoDataModule(folder, length, stride)
    module.finished = finished | {"a clip of another run"}
    with mock.patch.multiple(video_clips, probe=pretend, read=pictures):
        found = by_hand(module, world, workers)
        assert module.keys() == expected
    seen = {hand: [clip.key for clip in clips] for hand, clips in found.items()}
    left = [key for key in expected if key not in finished]
    assert sorted(key for keys in seen.values() for key in keys) == sorted(left)
    assert all(ordered(keys, expected) for keys in seen.values())
    for clip in (clip for clips in found.values() for clip in clips):
        shown = clip.pixels.flatten().tolist()
        assert shown == list(range(clip.start, clip.start + len(shown)))
        assert length is None or len(shown) == length
    if len(shards) >= world * workers:
        readers = {(home[key], hand) for hand, keys in seen.items() for key in keys}
        assert len(readers) == len({number for number, _ in readers}), "a shard is read by one"


@settings(deadline=None)
@given(st.data())
def test_every_prompt_of_random_shards_is_dealt_once(tmp_path_factory, data):
    count = data.draw(st.integers(1, 12), "prompts")
    folder = tmp_path_factory.mktemp("set")
    samples = [(f"s-{i}", {"prompt": f"fox {i % 3}"}) for i in range(count)]
    write_prompt_shards(samples, folder, "set", data.draw(st.integers(1, 5), "per shard"))
    world, workers = data.draw(st.integers(1, 5), "ranks"), data.draw(st.integers(1, 3), "workers")
    module = PromptDataModule(
        folder, samples=data.draw(st.integers(1, 2)), batch=data.draw(st.integers(1, 3))
    )
    keys = module.keys()
    finished = data.draw(st.sets(st.sampled_from(keys)), "finished")
    module.finished = finished
    loader = data.draw(st.sampled_from(("test", "val", "predict")), "loader")
    found = by_hand(module, world, workers, f"{loader}_dataloader")
    seen = [[item.key for batch in batches for item in batch] for batches in found.values()]
    assert sorted(chain(*seen)) == sorted(set(keys) - finished)
    assert all(ordered(part, keys) for part in seen)


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_every_clip_of_more_random_shards_is_read_once(tmp_path_factory, tar, vouch, data):
    once = test_every_clip_of_random_shards_is_read_once.hypothesis.inner_test
    once(tmp_path_factory, tar, vouch, data)


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_every_prompt_of_more_random_shards_is_dealt_once(tmp_path_factory, data):
    test_every_prompt_of_random_shards_is_dealt_once.hypothesis.inner_test(tmp_path_factory, data)


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 8))
def test_loads_differ_by_one_shard_at_most(sizes, hands):
    given_ = balanced(sizes, hands)
    assert sorted(chain(*given_)) == list(range(len(sizes)))
    loads = [sum(sizes[at] for at in own) for own in given_]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    if len(sizes) >= hands and min(sizes, default=1) > 0:
        assert all(given_)


def test_more_ranks_than_shards_share_their_videos(tmp_path, films):
    make_video_shards(films, tmp_path)
    found = by_hand(VideoDataModule(tmp_path), 3, 1)
    assert sorted(map(len, found.values())) == [1, 2, 2]
    few = by_hand(VideoDataModule(tmp_path), 4, 3)
    assert {rank for (rank, _), clips in few.items() if clips} == {0, 1, 2, 3}


def whole(path):
    return torch.cat(list(read(path)))


@pytest.mark.parametrize(("length", "stride"), [(3, None), (3, 1), (2, 5), (1, 7), (3, 3)])
@pytest.mark.parametrize("source", ["shards", "folder"])
def test_clips_are_the_frames_of_the_video(tmp_path, films, length, stride, source):
    folder = films
    if source == "shards":
        make_video_shards(films, tmp_path, shard_videos=2)
        folder = tmp_path
    for sample in find_videos(folder):
        frames = whole(sample.video)
        clips = list(clips_of(sample, Cut(length, stride)))
        starts = range(0, len(frames) - length + 1, stride or length)
        assert [clip.start for clip in clips] == list(starts)
        for clip in clips:
            assert torch.equal(clip.pixels, frames[clip.start : clip.start + length])
        last = Cut(length, stride).key(sample.key, starts[-1])
        others = {clip.key for clip in clips} - {last}
        (only,) = clips_of(sample, Cut(length, stride), others)
        assert only.key == last and torch.equal(only.pixels, clips[-1].pixels)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_batches_of_a_trainer(tmp_path, films, workers):
    make_video_shards(films, tmp_path / "set", shard_videos=2)
    data = VideoDataModule(tmp_path / "set", length=3, stride=8, batch=2, workers=workers)
    seen = []

    class Watch(lightning.LightningModule):
        def look(self, batch, index):
            assert isinstance(batch, VideoClip)
            assert batch.pixels.shape[1:] == (3, 3, 32, 48) and batch.pixels.dtype == torch.uint8
            assert batch.fps.tolist() == [8.0] * len(batch.key)
            seen.extend(batch.key)

        test_step = validation_step = predict_step = look

    kind = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(**kind, enable_checkpointing=False, enable_model_summary=False)
    for run in (trainer.test, trainer.validate, trainer.predict):
        run(Watch(), datamodule=data)
        assert sorted(seen) == sorted(data.keys()) and len(seen) > 8
        assert workers or seen == data.keys()
        seen.clear()
    data.finished = data.keys()[1:]
    trainer.test(Watch(), datamodule=data)
    assert seen == data.keys()[:1]


def test_a_training_goes_on_and_shuffles(films):
    data = VideoDataModule(films, length=3, stride=100, seed=3)
    data.setup("fit")
    first, again = ([], [])
    for seen in (first, again):
        for batch in data.train_dataloader():
            seen.extend(batch.key)
            if len(seen) == 15:
                break
    assert first == again and len({tuple(first[at : at + 5]) for at in (0, 5, 10)}) > 1
    assert all(sorted(first[at : at + 5]) == sorted(data.keys()) for at in (0, 5, 10))
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=6, max_steps=-1, limit_train_batches=1.0
    )
    with pytest.raises(ValueError, match=r"has no end\. Given max_steps -1"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"fewer videos than .*Given 5 videos for 6 workers"):
        data.setup("fit")


def test_a_table_of_pairs_is_a_set_of_videos(tmp_path, films):
    (tmp_path / "pairs.csv").write_text(
        f"reference,candidate,key,prompt\n{films}/a.mp4,{films}/b.mp4,one,a cat\n"
    )
    for column, frames in (("reference", 10), ("candidate", 35)):
        (clip,) = VideoDataModule(tmp_path / "pairs.csv", column=column).test_dataloader()
        assert (clip.key, clip.prompt, clip.pixels.shape[1]) == (["one"], ["a cat"], frames)
    with pytest.raises(ValueError, match="no such videos"):
        VideoDataModule(tmp_path / "pairs.csv", column="prompt").setup("test")


def test_pairs_come_from_every_loader(films):
    data = VideoPairDataModule(joined("films", {"again": pair_folders(films, films)}))
    loaders = (data.test_dataloader(), data.val_dataloader(), data.predict_dataloader())
    keys = [[(piece.name, piece.key) for piece in loader] for loader in loaders]
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) > 10


def test_what_lies_beside_a_video_is_not_in_the_way(tmp_path, tar, vouch, films):
    content = (films / "a.mp4").read_bytes()
    beside = ("latents.safetensors", "text.safetensors", "TXT")
    tar(tmp_path / "a.tar", [("0.mp4", content), *((f"0.{name}", b"later") for name in beside)])
    vouch(tmp_path, [1])
    assert check_shards(tmp_path) == []
    (sample,) = find_videos(tmp_path)
    assert sorted(sample.files) == ["latents.safetensors", "text.safetensors", "txt"]
    with sample.files["text.safetensors"].open() as file:
        assert file.read() == b"later"


@pytest.mark.parametrize(
    "more",
    [
        {"length": 0},
        {"stride": 4},
        {"length": 4, "stride": 0},
        {"size": (0, 8)},
        {"batch": 0},
        {"workers": -1},
    ],
)
def test_numbers_that_make_no_sense(films, more):
    with pytest.raises(ValueError, match="Given "):
        VideoDataModule(films, **more)


def test_videos_that_do_not_fit(tmp_path, films, film):
    with pytest.raises(
        VideoError, match=r"B side.mp4 is too short\. Given 3 frames for clips of 4"
    ):
        list(VideoDataModule(films, length=4).test_dataloader())
    with pytest.raises(ValueError, match="Clips of a batch have different shapes"):
        list(VideoDataModule(films, batch=2).test_dataloader())
    film(tmp_path / "a.mp4", 3, (16, 16))
    film(tmp_path / "b.mp4", 3, (32, 16))
    (batch,) = VideoDataModule(tmp_path, batch=2, size=(16, 24)).test_dataloader()
    assert batch.pixels.shape == (2, 3, 3, 16, 24)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="There are no videos"):
        VideoDataModule(tmp_path / "none").setup("test")
    with pytest.raises(ValueError, match="no folder and no table"):
        VideoDataModule(tmp_path / "nowhere").setup("test")


def test_a_shard_that_changes_after_the_start_is_not_read(tmp_path, films):
    index = make_video_shards(films, tmp_path, shard_videos=2)
    data = VideoDataModule(tmp_path)
    data.setup("test")
    path = index.paths[1]
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    seen = iter(data.test_dataloader())
    assert len([next(seen), next(seen)]) == 2
    with pytest.raises(ValueError, match=r"missing or damaged\. .*000001\.tar"):
        next(seen)


@pytest.mark.parametrize("kind", [ValueError, VideoError], ids=["shard", "video"])
def test_an_error_in_a_worker_is_said_as_without_workers(tmp_path, films, kind):
    said = []
    for workers in (0, 2):
        data = VideoDataModule(films, length=4, workers=workers)  # one of them is shorter
        if kind is ValueError:
            if not workers:
                index = make_video_shards(films, tmp_path, shard_videos=2)
                whole = index.paths[0].read_bytes()
            index.paths[0].write_bytes(whole)
            data = VideoDataModule(tmp_path, workers=workers)
            data.setup("test")
            index.paths[0].write_bytes(b"another file")
        with pytest.raises(kind) as error:
            list(data.test_dataloader())
        assert type(error.value) is kind
        said.append(str(error.value))
    assert said[0] == said[1] and "\n" not in said[0]


def held():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_is_flat_over_a_long_stream(tmp_path, film, capsys):
    """57,600 frames (one hour at 16 per second) of one video in a shard."""
    film(tmp_path / "films/a.mp4", 57_600, (96, 160), fps=16)
    make_video_shards(tmp_path / "films", tmp_path / "set")
    frames, seen = 0, {}
    for clip in VideoDataModule(tmp_path / "set", length=16).test_dataloader():
        frames += clip.pixels.shape[1]
        if frames % 4800 == 0:
            seen[frames] = held()
    rise = max(seen.values()) - seen[4800]
    with capsys.disabled():
        print(f"\n57,600 frames: {seen[4800] / 2**20:.1f} MiB after 4,800, at most "
              f"{rise / 2**20:.2f} MiB more until the end")  # fmt: skip
    assert frames == 57_600 and rise < 8 * 2**20
