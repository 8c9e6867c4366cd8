"""The data module: what a run holds, and what a resumed run with other ranks still does."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.data.datamodule import PromptData, PromptSample
from lightning_kv.data.shards import write_prompt_shards

COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten prompts of which many have the same text."""
    folder = tmp_path_factory.mktemp("set")
    samples = [(f"s-{i}", {"prompt": ("red fox", "blue fox")[i % 2]}) for i in range(COUNT)]
    write_prompt_shards(samples, folder, "set", per_shard=4)
    return folder


def place(data: PromptData, rank: int, world: int) -> PromptData:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return data


def seen(data: PromptData) -> list[str]:
    data.setup("test")
    return [sample.key for batch in data.test_dataloader() for sample in batch]


def test_keys_are_unique_and_say_the_text(folder):
    data = PromptData(folder)
    keys = data.keys()
    assert data.total == len(set(keys)) == COUNT
    assert [key.rsplit("-", 1)[0] for key in keys] == ["red-fox", "blue-fox"] * 5
    assert seen(data) == keys


def test_world_seed_differs_between_equal_texts_and_between_data_seeds(folder):
    seeds = [
        sample.world_seed
        for seed in (0, 1)
        for batch in PromptData(folder, seed=seed).test_dataloader()
        for sample in batch
    ]
    assert len(set(seeds)) == 2 * COUNT
    assert not set(PromptData(folder, seed=0).keys()) & set(PromptData(folder, seed=1).keys())


def test_prompts_takes_the_first_ones(folder):
    assert PromptData(folder, prompts=3).keys() == PromptData(folder).keys()[:3]
    assert PromptData(folder, prompts=COUNT).keys() == PromptData(folder).keys()
    assert seen(PromptData(folder, prompts=3)) == PromptData(folder).keys()[:3]


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batches_are_lists_of_prompt_samples(folder, batch):
    batches = list(PromptData(folder, batch=batch).test_dataloader())
    assert [len(part) for part in batches] == [
        min(batch, COUNT - start) for start in range(0, COUNT, batch)
    ]
    assert all(isinstance(part, list) for part in batches)
    assert all(isinstance(sample, PromptSample) for part in batches for sample in part)


@pytest.mark.parametrize("prompts", [0, -1, COUNT + 1])
def test_impossible_number_of_prompts_is_refused(folder, prompts):
    with pytest.raises(ValueError, match="cannot give") as error:
        PromptData(folder, prompts=prompts).setup("test")
    assert f"prompts={prompts} was given" in str(error.value)
    assert f"Use 1 to {COUNT}" in str(error.value)


def test_impossible_batch_is_refused(folder):
    with pytest.raises(ValueError, match="batch=0 was given"):
        PromptData(folder, batch=0)


def test_more_ranks_than_prompts_of_the_run_are_refused(folder):
    place(PromptData(folder, prompts=3), 0, 3).setup("test")
    with pytest.raises(ValueError, match="more ranks than prompts") as error:
        place(PromptData(folder, prompts=3), 0, 4).setup("test")
    assert "4 ranks share 3 prompts" in str(error.value)
    assert "Use at most 3 devices" in str(error.value)


def test_prompts_with_one_key_are_refused(folder, monkeypatch):
    monkeypatch.setattr("lightning_kv.data.shards.world_seed_of", lambda seed, key: 7)
    with pytest.raises(ValueError, match="no distinct keys") as error:
        PromptData(folder).setup("test")
    assert "2 keys for 10 prompts" in str(error.value)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_resume_with_other_ranks_covers_every_prompt_exactly_once(folder, data):
    prompts = data.draw(st.integers(1, COUNT), "prompts")
    first, second = (data.draw(st.integers(1, prompts), "ranks") for _ in range(2))
    batch = data.draw(st.integers(1, 3), "batch")
    covered = []
    for rank in range(first):
        part = seen(place(PromptData(folder, prompts, batch=batch), rank, first))
        # The first run is stopped: each rank has finished some of its prompts, in order.
        covered += part[: data.draw(st.integers(0, len(part)), "finished")]
    finished = {*covered, "prompt-of-another-run"}
    for rank in range(second):
        resumed = place(PromptData(folder, prompts, batch=batch), rank, second)
        resumed.finished = finished
        covered += seen(resumed)
    assert sorted(covered) == sorted(PromptData(folder, prompts).keys())


class Collect(lightning.LightningModule):
    """A task that writes down what it is given and marks one prompt as finished in its setup."""

    def __init__(self, finished: set[str]):
        super().__init__()
        self.finished, self.seen = finished, []

    def setup(self, stage):
        self.trainer.datamodule.finished = self.finished

    def test_step(self, batch, index):
        assert all(isinstance(sample, PromptSample) for sample in batch)
        self.seen.extend(sample.key for sample in batch)
        return torch.zeros(())


@pytest.mark.parametrize("done", [0, 4, COUNT])
@pytest.mark.filterwarnings("ignore")
def test_trainer_gives_a_task_what_is_unfinished(folder, done, tmp_path):
    data = PromptData(folder, batch=3)
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
