"""Evaluations say of which prompts, models and weights the scorers of their policies are."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_kv import load_model
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.policies.head_curves import described
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.tasks.evaluate import EvaluateModule
from lightning_kv.tasks.measuring.fingerprint import weights_of

SHARDS = Path(__file__).parents[2] / "data" / "panorama-fast13"
SETTINGS = {"metrics": ["psnr"], "frames": 15, "context_frames": 6}


@pytest.fixture(scope="module")
def file(tmp_path_factory, panorama):
    """A scorer that was taught on two prompts of the shards, and stopped by a third."""
    path, geometry = tmp_path_factory.mktemp("scorers") / "mine.safetensors", panorama.network
    geometry = geometry.geometry()
    *taught, held = sorted(PromptDataModule(SHARDS, 3, seed=1).keys())
    data = {"prompts": taught, "validation_prompts": [held]}
    model = {"name": "panorama", "fingerprint": weights_of(panorama)}
    about = {"model": model | {"geometry": described(geometry)}, "data": data}
    replace(Scorer.fresh("linear", geometry), about=about).save(path)
    return str(path)


def policies(file, *kinds):
    parts = {"retain": "distilled", "select": "distilled-reads"}
    return [
        {"name": kind, kind: {"part": parts[kind], "scorer": file, "budget": "6f"}}
        for kind in kinds
    ]


@pytest.mark.parametrize(
    ("kinds", "whose"),
    [
        (("retain",), "'retain' looks"),
        (("select",), "'select' looks"),
        (("retain", "select"), "2 policies look"),
    ],
)
def test_prompts_that_a_scorer_was_taught_on_are_named_once_for_the_file(file, kinds, whose):
    module = EvaluateModule("panorama", policies(file, *kinds), **SETTINGS)
    with pytest.warns(UserWarning, match="taught on") as seen:
        module.check_data(PromptDataModule(SHARDS, 3, seed=1))
    (said,) = (str(own.message) for own in seen)
    assert said.startswith("A scorer (mine.safetensors) was taught on 3 prompts of this evaluation")
    assert (
        f"or stopped by them, and there {whose} too good: " in said
        and "another --data.seed" in said
    )
    keys = PromptDataModule(SHARDS, 3, seed=1).keys()
    assert all(key in said for key in keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.check_data(PromptDataModule(SHARDS, 3))
    assert module.about()["run"]["foreign_heads"] == []


def test_a_run_records_that_a_scorer_is_of_other_weights(file):
    model = load_model("panorama")
    model.source["sha256"] = "another"
    module = EvaluateModule(model, policies(file, "retain", "select"), **SETTINGS)
    with pytest.warns(UserWarning, match="taught on other weights of 'panorama'") as seen:
        module.check_data(PromptDataModule(SHARDS, 3))
    assert [str(own.message) for own in seen] == module.about()["run"]["foreign_heads"]
    told = module.about()["policies"]["retain"]["retain"]["scorer"]
    assert told["file"] == "mine.safetensors" and len(told["sha256"]) == 64
