"""The data module: what a run holds, and what a resumed run with other ranks still does."""

from types import SimpleNamespace
from unittest import mock

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.data.datamodule import PromptDataModule, RolloutItem, dealt, distribution
from lightning_kv.data.shards import write_prompt_shards

COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten prompts of which many have the same text."""
    folder = tmp_path_factory.mktemp("set")
    samples = [(f"s-{i}", {"prompt": ("red fox", "blue fox")[i % 2]}) for i in range(COUNT)]
    write_prompt_shards(samples, folder, "set", per_shard=4)
    return folder


def place(data: PromptDataModule, rank: int, world: int) -> PromptDataModule:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=None)
    return data


def seen(data: PromptDataModule) -> list[str]:
    data.setup("test")
    return [item.key for batch in data.test_dataloader() for item in batch]


def test_keys_are_unique_and_say_the_text(folder):
    data = PromptDataModule(folder)
    keys = data.keys()
    assert data.total == len(set(keys)) == COUNT
    assert [key.rsplit("-", 1)[0] for key in keys] == ["red-fox", "blue-fox"] * 5
    assert seen(data) == keys


def test_world_seed_differs_between_equal_texts_and_between_data_seeds(folder):
    seeds = [
        item.prompt.world_seed
        for seed in (0, 1)
        for batch in PromptDataModule(folder, seed=seed).test_dataloader()
        for item in batch
    ]
    assert len(set(seeds)) == 2 * COUNT
    assert not set(PromptDataModule(folder, seed=0).keys()) & set(
        PromptDataModule(folder, seed=1).keys()
    )


def test_prompts_takes_the_first_ones(folder):
    assert PromptDataModule(folder, prompts=3).keys() == PromptDataModule(folder).keys()[:3]
    assert PromptDataModule(folder, prompts=COUNT).keys() == PromptDataModule(folder).keys()
    assert seen(PromptDataModule(folder, prompts=3)) == PromptDataModule(folder).keys()[:3]


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batches_are_lists_of_rollouts(folder, batch):
    batches = list(PromptDataModule(folder, batch=batch).test_dataloader())
    assert [len(part) for part in batches] == [
        min(batch, COUNT - start) for start in range(0, COUNT, batch)
    ]
    assert all(isinstance(part, list) for part in batches)
    assert all(isinstance(item, RolloutItem) for part in batches for item in part)


@pytest.mark.parametrize("prompts", [0, -1, COUNT + 1])
def test_impossible_number_of_prompts_is_refused(folder, prompts):
    with pytest.raises(ValueError, match="cannot give") as error:
        PromptDataModule(folder, prompts=prompts).setup("test")
    assert f"prompts={prompts} was given" in str(error.value)
    assert f"Use 1 to {COUNT}" in str(error.value)


def test_impossible_batch_is_refused(folder):
    with pytest.raises(ValueError, match="batch=0, samples=1"):
        PromptDataModule(folder, batch=0)


def test_a_rank_may_have_nothing_to_do(folder):
    data = place(PromptDataModule(folder, prompts=3), 3, 4)
    assert seen(data) == [] and data.left() == 0


def under(data, *names):
    """The module of the trainer wants these rollouts of every prompt."""
    data.trainer.lightning_module = SimpleNamespace(names=names)
    return data


def test_what_takes_longest_is_dealt_out_first(folder):
    keys = PromptDataModule(folder).keys()
    slow, done = keys[1::4], {keys[2]}  # three of them, all of which rank 1 of 2 or 4 would get
    for world in (1, 2, 3):
        ranks = []
        for rank in range(world):
            data = place(PromptDataModule(folder), rank, world)
            data.longest, data.finished = slow, done
            ranks.append(seen(data))
            assert data.left() == len(ranks[-1])
        assert sorted(key for own in ranks for key in own) == sorted(set(keys) - done)
        counts = [len(set(own) & set(slow)) for own in ranks]
        assert max(counts) - min(counts) <= 1
        assert all(set(own[:n]) <= set(slow) for own, n in zip(ranks, counts, strict=True))
    assert [item.key for item in PromptDataModule(folder).items()] == keys


def test_the_policies_of_a_prompt_and_noise_follow_each_other_the_reference_first(folder):
    data = under(place(PromptDataModule(folder, prompts=2, samples=2), 0, 1), "full", "window")
    items = [item for batch in data.test_dataloader() for item in batch]
    first, second = (sample.key for sample in data.prompt_samples())
    expected = [first, f"{first}-s1", second, f"{second}-s1"]
    assert [item.key for item in items] == [key for key in expected for _ in "fw"]
    assert [item.policy for item in items] == ["full", "window"] * 4
    assert data.keys() == expected and data.first(1) == [first]
    assert data.describe()["samples"] == 2 and "samples" not in PromptDataModule(folder).describe()


def test_a_batch_is_of_one_policy(folder):
    data = under(place(PromptDataModule(folder, prompts=5, batch=2), 0, 1), "full", "window")
    found = [[(item.key, item.policy) for item in batch] for batch in data.test_dataloader()]
    keys = data.keys()
    groups = [keys[:2], keys[2:4], keys[4:]]
    assert found == [[(k, name) for k in group] for group in groups for name in ("full", "window")]


@pytest.mark.parametrize("samples", [0, -1])
def test_no_noise_at_all_is_refused(folder, samples):
    with pytest.raises(ValueError, match=f"samples={samples}"):
        PromptDataModule(folder, samples=samples)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 24), st.integers(1, 6), st.integers(1, 4))
def test_every_item_is_dealt_to_exactly_one_worker(items, world, workers):
    found = {}
    for rank in range(world):
        for worker in range(workers):
            info = SimpleNamespace(id=worker, num_workers=workers)
            with mock.patch.object(distribution, "get_worker_info", return_value=info):
                found[rank * workers + worker] = list(dealt(range(items), rank, world))
    hands = world * workers  # like cards: hand i holds every (world x workers)-th, from card i on
    assert found == {i: list(range(items))[i::hands] for i in range(hands)}


def test_prompts_with_one_key_are_refused(folder, monkeypatch):
    monkeypatch.setattr("lightning_kv.data.shards.world_seed_of", lambda seed, key: 7)
    with pytest.raises(ValueError, match="no distinct keys") as error:
        PromptDataModule(folder).setup("test")
    assert "2 keys for 10 prompts" in str(error.value)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_resume_with_other_ranks_covers_every_prompt_exactly_once(folder, data):
    prompts = data.draw(st.integers(1, COUNT), "prompts")
    first, second = (data.draw(st.integers(1, 5), "ranks") for _ in range(2))
    samples = data.draw(st.integers(1, 3), "samples")
    batch = data.draw(st.integers(1, 3), "batch")
    covered = []
    for rank in range(first):
        part = seen(place(PromptDataModule(folder, prompts, samples, batch=batch), rank, first))
        # The first run is stopped: each rank has finished some of its prompts, in order.
        covered += part[: data.draw(st.integers(0, len(part)), "finished")]
    finished = {*covered, "prompt-of-another-run"}
    for rank in range(second):
        resumed = place(PromptDataModule(folder, prompts, samples, batch=batch), rank, second)
        resumed.finished = finished
        covered += seen(resumed)
    assert sorted(covered) == sorted(PromptDataModule(folder, prompts, samples).keys())


class Collect(lightning.LightningModule):
    """A task that writes down what it is given and marks one prompt as finished in its setup."""

    def __init__(self, finished: set[str]):
        super().__init__()
        self.finished, self.seen = finished, []

    def setup(self, stage):
        self.trainer.datamodule.finished = self.finished

    def test_step(self, batch, index):
        assert all(isinstance(item, RolloutItem) for item in batch)
        self.seen.extend(item.key for item in batch)
        return torch.zeros(())


@pytest.mark.parametrize("done", [0, 4, COUNT])
@pytest.mark.filterwarnings("ignore")
def test_trainer_gives_a_task_what_is_unfinished(folder, done, tmp_path):
    data = PromptDataModule(folder, batch=3)
    task = Collect(set(data.keys()[:done]))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.test(task, datamodule=data, verbose=False)
    assert task.seen == data.keys()[done:]
