"""A scorer as a ranking on held-out prompts: from decisions to records, and to verdicts."""

import json
import shutil
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "calibration"))
sys.path.insert(0, str(Path(__file__).parents[2] / "distillation"))
from random_lists import random_lists
from tiny_network import TINY, encoder

from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.make_shards import make_prompt_shards
from lightning_kv.distillation.baselines import by_scorer
from lightning_kv.distillation.collect import Taught
from lightning_kv.distillation.judging import OUTPUTS, OWN, RANKED, ListMetric
from lightning_kv.distillation.labels import Teacher
from lightning_kv.distillation.samples import lists_of_clip
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.budget.uniform import Uniform
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.policies.retain.oracle import Oracle
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES, GROUPS
from lightning_kv.rollout import rollout
from lightning_kv.stats.inference import holm, sign_flip_p
from lightning_kv.tasks.callbacks import ProofWriter, ScorerProofWriter
from lightning_kv.tasks.proof.scorer import conclude, headline, proved, sections
from lightning_kv.tasks.proof.scorer_design import ScorerDesign, ScorerSource, dealt
from lightning_kv.tasks.prove import ProveScorerModule

FRAMES, BUDGETS = 15, (4, 6)
MEASURED = (4,)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = replace(TINY, layers=2, latent_size=(2, 4), model="tiny")
    network = CausalWan(config).eval().requires_grad_(False)
    return VideoModel(network, None, lambda prompts: encoder(prompts).float(), name="tiny")


@pytest.fixture(scope="module")
def geometry(model):
    return replace(model.network.geometry(), model="tiny")


def random_scorer(geometry, kind="mlp", features=tuple(FEATURES), seed=0, **about):
    """One that ranks by no policy that anybody knows."""
    scorer = Scorer.fresh(kind, geometry, features)
    rng = torch.Generator().manual_seed(seed)
    for weight in scorer.student.parameters():
        weight.add_(0.5 * torch.randn(weight.shape, generator=rng))
    return replace(scorer, about=about)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, geometry):
    folder = tmp_path_factory.mktemp("scorers")
    told = {"teacher": asdict(Teacher("mass-future", 2, 0.7)), "data": {"prompts": []}}
    random_scorer(geometry, **told).save(folder / "mlp.safetensors")
    names = tuple(FEATURES)[3:]  # others than the scorer looks at, in another order
    names = names[::-1]
    random_scorer(geometry, "linear", names, **told).save(folder / "linear.safetensors")
    Scorer.fresh("mlp", geometry).save(folder / "fresh.safetensors")
    return folder


def ran(module, writer, data):
    """A run as a user's own few lines make it."""
    trainer = L.Trainer(
        callbacks=[writer],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    return writer.found


def prompts(folder, count=6):
    if not (folder / "set").is_dir():
        (folder / "set.txt").write_text("".join(f"held out {i}\n" for i in range(9)))
        make_prompt_shards(folder / "set.txt", folder / "set")
    return PromptDataModule(folder / "set", count)


def proving(folder, model, name="mlp", **settings):
    settings = {"budgets": MEASURED, "frames": FRAMES, "outputs": True} | settings
    return ProveScorerModule(model, folder / f"{name}.safetensors", **settings)


@pytest.fixture(scope="module")
def judged(folder, model):
    """A proof of a scorer that knows nothing, with all there is to compare it with."""
    module = proving(folder, model, linear=folder / "linear.safetensors")
    return module, ran(module, ScorerProofWriter(folder / "proof"), prompts(folder))


# -- from decisions to records -----------------------------------------------------------------


def test_a_record_holds_what_each_ranking_keeps(judged, folder, model):
    """One clip at one budget once more, by hand; the linear student has other columns."""
    item = prompts(folder).items()[3]
    record = ScorerProofWriter(folder / "proof").run.read(item.key)
    assert record.sites.keys() == {(budget, who) for budget in MEASURED for who in (0, 1)}
    common = {"frames": FRAMES, "keys": [item.key], "decode": False}
    need = {"mass": {}, "outputs": {"queries": 4}}
    tables = rollout(model, preset("full"), item.prompt.prompt, record=need, **common).tables
    own = {name: table[0] for name, table in tables.items()}
    scorers = {
        "scorer": Scorer.load(folder / "mlp.safetensors"),
        "linear": Scorer.load(folder / "linear.safetensors"),
    }
    for who in (0, 1):
        budget = Uniform("4f")
        part = Taught(
            budget=budget,
            scorer=scorers["scorer"],
            teacher=Oracle(budget=budget, objective="mass", discount=0.7, horizon=2),
            share=1.0 - who,
        )
        policy = replace(preset("full"), name="watched", retain=part)
        rollout(model, policy, item.prompt.prompt, tables={"mass": tables["mass"]}, **common)
        lists = lists_of_clip(part.watched, own, Teacher("mass-future", 2, 0.7), item.key, 4)
        site = record.sites[4, who]
        assert int(site["lists"]) == len(lists)
        columns = [tuple(FEATURES).index(name) for name in scorers["linear"].features]
        features = {"scorer": lists.features, "linear": lists.features[..., columns]}
        found = {
            name: scorer.scores(
                features[name], lists.context, lists.layer, lists.head, lists.candidate
            )
            for name, scorer in scorers.items()
        }
        found["oracle"] = lists.target
        found["recency"] = torch.arange(lists.places).float().expand_as(lists.target)
        found["h2o"] = lists.features[..., tuple(FEATURES).index("total-mass")]
        for name, scores in found.items():
            metric = ListMetric([OWN], layers=2, heads=2, outputs=True)
            metric.update(scores, lists)
            assert torch.allclose(site[name], metric.sums[:, :, 0], atol=1e-9), name


def test_memories_of_the_scorer_are_those_of_the_policy(folder, model, geometry):
    """Written down with all features, one that looks at a few decides as it does alone."""
    scorer = Scorer.load(folder / "linear.safetensors")
    design = ScorerDesign(ScorerSource(Path("x"), scorer), None, (4,), geometry)
    spec = {"part": "distilled", "budget": "4f", "scorer": str(folder / "linear.safetensors")}
    common = {"frames": FRAMES, "keys": ["a"], "decode": False}
    latents = [
        rollout(model, policy, "a cat", **common).latents
        for policy in (
            design.policy(4, by_scorer=True),
            policy_from_dict({"name": "x", "retain": spec}),
            preset("sliding-window@4f"),
        )
    ]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_an_untrained_scorer_is_its_prior(folder, model):
    module = proving(folder, model, "fresh", outputs=None)
    found = ran(module, ScorerProofWriter(folder / "untrained"), prompts(folder))
    for own in found.budgets:
        assert own.mean("scorer") == own.mean("untrained") == own.mean("h2o")
        assert own.mean("oracle") == 0 and own.mean("oracle", "recall") == 1
        assert own.linear is None and own.rows[0].teacher_led["output_error"] == (None,) * 3
        rows = {row.ranking: row for row in own.rows}
        assert rows["h2o"].against.gain == 0 and rows["h2o"].against.p == 1
        assert rows["random"].teacher_led["regret"][0] == pytest.approx(1, abs=0.35)
    assert found.verdict != "learned" and "No linear student was given" in found.words[1]
    assert any("does not say what taught it" in said for said in found.words)
    assert found.words[-1] == "Outputs were not recorded, so they are not judged."
    assert len(sections(found)[0].heads) == 9


def test_features_are_dealt_among_the_candidates_of_a_list(geometry):
    lists, _ = random_lists(features=len(FEATURES), context=len(CONTEXT))
    lists = replace(lists, layer=lists.layer % 2, head=lists.head % 2)
    noise = torch.rand(lists.candidate.shape, generator=torch.Generator().manual_seed(1))
    moved = dealt(lists, noise)
    age = [name in GROUPS["age"] for name in FEATURES]
    rest = [not own for own in age]
    changed = 0
    for row, after, there in zip(lists.features, moved.features, lists.candidate, strict=True):
        assert torch.equal(row[:, age], after[:, age])  # alone where it was
        own, other = row[there][:, rest], after[there][:, rest]  # all others, together
        place = [int((other == line).all(1).nonzero()) for line in own]
        assert sorted(place) == list(range(len(own)))
        changed += place != sorted(place)
    assert changed > 20 and torch.equal(moved.target, lists.target)
    scores, other = (by_scorer(own, random_scorer(geometry)) for own in (lists, moved))
    assert not torch.allclose(scores[lists.candidate], other[lists.candidate])


def test_what_was_stopped_goes_on(judged, folder, model, tmp_path):
    _, found = judged
    linear = {"linear": folder / "linear.safetensors"}
    shutil.copytree(folder / "proof", tmp_path / "p")
    writer = ScorerProofWriter(tmp_path / "p")
    for path in sorted((tmp_path / "p/clips").iterdir())[2:4]:
        path.unlink()
    assert ran(proving(folder, model, **linear), writer, prompts(folder)) == found
    assert len(list((tmp_path / "p/clips").iterdir())) == 6
    with pytest.raises(ValueError, match=r"holds another run.*budgets"):
        ran(proving(folder, model, budgets=(5,), **linear), writer, prompts(folder))
    data = PromptDataModule(folder / "set", 6)
    empty = ScorerProofWriter(tmp_path / "none").run
    with pytest.raises(ValueError, match="Nothing is measured so far"):
        module = proving(folder, model, **linear)
        conclude(empty, module.wanted(data), module.design)


def test_prompts_of_the_file_are_named(judged, folder, model, geometry, tmp_path, monkeypatch):
    keys = prompts(folder).keys()
    about = {"data": {"prompts": [keys[2], "elsewhere", keys[5]]}, "model": {"name": "another"}}
    random_scorer(geometry, **about).save(tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match="taught on.*another"):
        module = proving(tmp_path, model, "s")
    run = ScorerProofWriter(folder / "proof").run
    record = run.read(run.path.joinpath("clips").glob("*").__next__().stem)
    monkeypatch.setattr(
        ProveScorerModule,
        "measured",
        lambda self, item: replace(record, key=item.key, unit=item.prompt.key),
    )
    with pytest.warns(UserWarning, match="was taught on 2 prompts") as seen:
        found = ran(module, ScorerProofWriter(tmp_path / "p"), prompts(folder))
    (told,) = (str(own.message) for own in seen if "taught on 2" in str(own.message))
    assert keys[2] in told and keys[5] in told and keys[0] not in told
    assert any("another" in said for said in found.words)


def test_what_does_not_fit_is_refused_before_anything_is_measured(folder, model, tmp_path):
    def of(match, *words, **settings):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=match):
            warnings.simplefilter("error")
            count = settings.pop("count", 6)
            ran(
                proving(folder, model, *words, **settings),
                ScorerProofWriter(tmp_path / "p"),
                prompts(folder, count),
            )

    of(r"on 3 no test at 1 budget .*Give 6 or more", count=3)
    of(r"At 2f, 3f there is nothing to choose.*4f or more", budgets=(3, 2, 6))
    of(r"of 15 frames are too short for memories of 15f.*--frames 21", budgets=(15,))
    of(r"as the linear student: it is of the kind 'mlp'", linear=folder / "mlp.safetensors")
    of(r"No scorer at", "absent")
    with pytest.raises(ValueError, match="No scorer is shipped for the model 'tiny'"):
        ProveScorerModule(model, frames=FRAMES)
    with pytest.raises(ValueError, match="another model"):
        ProveScorerModule("panorama", folder / "mlp.safetensors")
    rolling = CausalWan(replace(model.network.config, sampler="rolling")).eval()
    with pytest.raises(ValueError, match="'rolling' has none"):
        proving(folder, VideoModel(rolling, None, encoder, name="tiny"))
    with pytest.raises(ValueError, match="writes what a ProveBudgetsModule"):
        ran(proving(folder, model), ProofWriter(tmp_path / "p"), prompts(folder))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "objective", "said"),
    [("out-future", "output", 0), ("mass-future", "mass", 0), ("next-use", "mass", 1)],
)
def test_the_teacher_of_the_file_leads_and_judges(geometry, target, objective, said):
    teacher = Teacher(target, 3, 0.6, 2)
    scorer = random_scorer(geometry, teacher=asdict(teacher) | {"of": "later versions"})
    design = ScorerDesign(ScorerSource(Path("x"), scorer), None, (4,), geometry, outputs=False)
    part = design.policy(4, by_scorer=False).retain.teacher
    assert design.teacher == teacher and len(design.notes) == 1 + said + (not design.outputs)
    assert (part.objective, part.horizon, part.discount) == (objective, 3, 0.6)
    assert ("outputs" in design.needs) == design.outputs == (objective == "output")


# -- from records to verdicts ------------------------------------------------------------------

MEASURES = (*RANKED, *OUTPUTS)
USUAL = {
    "scorer": 0.1,
    "linear": 0.2,
    "untrained": 0.6,
    "shuffled": 1.0,
    "recency": 1.1,
    "snap-kv": 0.8,
    "h2o": 0.6,
    "focused": 0.7,
    "future": 0.65,
    "running-mass": 0.75,
    "logit": 0.9,
    "random": 1.0,
    "oracle": 0.0,
}


def records(prompts=8, samples=2, spread=0.01, on=1.1, skill=None, budgets=BUDGETS, **changed):
    """Clips with such regrets (by budget where they differ), and skills that are 1 less these."""
    found = []
    for n in range(prompts):
        for sample in range(samples):
            sites = {}
            for place, budget in enumerate(budgets):
                for who in (0, 1):
                    site = {"lists": torch.tensor(10.0, dtype=torch.float64)}
                    for name, usual in (USUAL | changed).items():
                        rng = np.random.default_rng([n, sample, place, who, *name.encode()])
                        regret = usual[place] if isinstance(usual, tuple) else usual
                        regret += (rng.normal(0, spread) if regret else 0) * (who == 0)
                        regret *= on if who and name == "scorer" else 1
                        below = rng.uniform(1, 2, (len(MEASURES), 4))
                        ratio = np.full((len(MEASURES), 1), 1 - regret)
                        ratio[MEASURES.index("regret")] = regret
                        if name == "scorer" and skill is not None:
                            ratio[MEASURES.index("age_residual_recall")] = skill
                        site[name] = torch.tensor(np.stack([ratio * below, below], 1))
                    sites[budget, who] = site
            found.append(ClipRecord(f"p{n}#{sample}", f"p{n}", sites))
    return found


@pytest.fixture(scope="module")
def design(geometry):
    scorer = random_scorer(geometry, teacher=asdict(Teacher("mass-future", None, 0.8)))
    source = ScorerSource(Path("s.safetensors"), scorer)
    linear = ScorerSource(Path("l"), random_scorer(geometry, "linear"))
    return ScorerDesign(source, linear, BUDGETS, geometry)


def test_figures_are_those_of_the_records(design):
    clips = records()
    found = proved(clips[::-1], design)
    assert found == proved(clips, design) and found.lists == 8 * 2 * 4 * 10

    def regrets(ranking, budget, who=0):
        place = MEASURES.index("regret")
        every = {}
        for clip in clips:
            above, below = clip.sites[budget, who][ranking][place].sum(-1).tolist()
            own = every.setdefault(clip.unit, [0, 0])
            every[clip.unit] = [own[0] + above, own[1] + below]
        return np.array([above / below for above, below in every.values()])

    tests = []
    for own in found.budgets:
        scorer, best = regrets("scorer", own.budget), regrets("h2o", own.budget)
        row = own.rows[0]
        assert own.best == "h2o" and own.state == "better" and own.needed is None
        assert own.mean("scorer") == pytest.approx(scorer.mean())
        assert row.teacher_led["regret"][1] < scorer.mean() < row.teacher_led["regret"][2]
        assert own.against_best.gain == pytest.approx((best - scorer).mean())
        assert own.gap.value == pytest.approx(1 - scorer.mean() / best.mean())
        assert own.gap.low < own.gap.value < own.gap.high
        led = regrets("scorer", own.budget, 1)
        assert own.ratio.value == pytest.approx(led.mean() / scorer.mean())
        assert own.on_policy_gap.value == pytest.approx(1 - led.mean() / 0.6)
        assert own.linear.gain == pytest.approx((regrets("linear", own.budget) - scorer).mean())
        tests.append(sign_flip_p(best - scorer))
    assert [own.p for own in found.budgets] == holm(tests)
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["verdict"] == "learned"


def test_the_verdict_takes_three_sentences(design):
    found = proved(records(), design)
    first, second, third, *rest = found.words
    assert found.verdict == "learned"
    assert first.startswith(
        "Learned: less regret than the best training-free ranking on 8 held-out prompts: 0."
    )
    assert "of h2o at 4f (8" in first and "of h2o at 6f (8" in first
    assert second.startswith("It is better than the linear student at 4f, 6f (regret +0.")
    assert "; it has skill beyond recency at 4f, 6f (of what that drops it keeps 0." in second
    assert third.endswith("within the 1.15 that are allowed.") and "1.1" in third
    assert "320 decisions" not in rest[0] and "640 decisions of heads" in rest[0]
    assert len(rest) == 2 and "flatters" in rest[0] and "stand-ins" in rest[1]


def test_other_verdicts(design):
    def said(**changed):
        found = proved(records(**changed), design)
        return found.verdict, found.words

    verdict, words = said(scorer=(0.1, 0.9))
    assert verdict == "learned in part" and "(better, 8" in words[0]
    assert "(no better, none of the gap to the oracle closed" in words[0]
    verdict, words = said(scorer=0.7)
    assert verdict == "no better" and words[0].startswith("No better than the best training-free")
    verdict, words = said(scorer=0.53, spread=0.1)
    assert verdict == "undecided" and "prompts would do." in words[0]
    assert "within" in said(on=1.14, spread=0.001)[1][2]
    assert "above the 1.15" in said(on=1.2, spread=0.001)[1][2]
    assert "linear student does as well: use that" in said(linear=0.1)[1][1]
    (worse,) = (w for w in said(linear=0.05)[1][1:2])
    assert "does as well, and better at 4f, 6f: use that one" in worse
    assert "at 4f and not at 6f" in said(linear=(0.2, 0.1))[1][1]


def test_skill_is_what_chance_does_not_keep(design):
    found = proved(records(skill=-0.01), design)
    assert "no skill beyond recency is shown" in found.words[1]
    own = proved(records(skill=0.37), design).budgets[0]
    assert own.hoarders == ("h2o",) and "is kept by h2o" in own.words[-1]
    assert not proved(records(), design).budgets[0].hoarders


def test_where_the_oracle_is_met_nothing_is_said_of_its_own_memories(design):
    found = proved(records(scorer=0.0), design)
    assert found.verdict == "learned" and "nothing can be said of its own" in found.words[2]
    assert headline("learned", found.budgets, 8).count("100.0 %") == 6


def test_the_table(design):
    (first, second), found = sections(proved(records(), design)), proved(records(), design)
    assert first.title == "Memories of 4f" and second.title == "Memories of 6f"
    rows = {row[0]: row for row in first.rows}
    assert list(rows) == list(design.rankings) and all(
        len(r) == len(first.heads) for r in first.rows
    )
    assert rows["scorer"][3:5] == ("", "") and rows["linear"][3].startswith("+0.")
    assert rows["oracle"][1] == "0 [0, 0]" and found.budgets[0].words == first.sentences
