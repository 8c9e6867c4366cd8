"""Students: what they rank untrained, what cannot change their scores, what they are made of."""

import itertools

import pytest
import torch
from torch import nn

from lightning_kv.policies.scorer.students import STUDENTS, make_student

K, C, L, H = 5, 3, 4, 2
SIZES = {"features": K, "context": C, "layers": L, "heads": H}


def student(kind, embeddings=True, trained=True, seed=0, **sizes):
    torch.manual_seed(seed)
    prior = torch.randn(sizes.get("features", K))
    made = make_student(kind, **(SIZES | sizes), embeddings=embeddings, prior=prior)
    if trained:
        with torch.no_grad():
            for value in made.parameters():
                value.normal_(0, 0.3)
            for name, value in made.named_buffers():
                value.uniform_(0.5, 2) if "std" in name else value.normal_()
    return made


def given(count=6, places=7, seed=1):
    rng = torch.Generator().manual_seed(seed)
    candidate = torch.rand(count, places, generator=rng) < 0.7
    candidate[0], candidate[1] = False, False
    candidate[1, 3] = True  # a list without a candidate, and one with a single one
    return {
        "features": torch.randn(count, places, K, generator=rng) * 3 + 1,
        "context": torch.randn(count, C, generator=rng),
        "layer": torch.randint(L, (count,), generator=rng),
        "head": torch.randint(H, (count,), generator=rng),
        "candidate": candidate,
    }


EVERY = [*itertools.product(STUDENTS, (True, False))]
every = pytest.mark.parametrize(("kind", "embeddings"), EVERY)


@pytest.mark.parametrize(
    ("kind", "sizes"), {"linear": 360 * 25, "mlp": 4993 + 3120, "set": 18625 + 3120}.items()
)
def test_sizes_are_those_of_the_specification(kind, sizes):
    made = make_student(kind, features=24, context=4, layers=30, heads=12, prior=[0.0] * 24)
    assert sum(x.numel() for x in made.parameters()) == sizes + 24  # and the prior


@every
def test_untrained_it_ranks_as_its_prior_does(kind, embeddings):
    made, x = student(kind, embeddings, trained=False), given()
    scores = made(**x)
    for n, line in enumerate(x["candidate"]):
        own = x["features"][n, line].double()
        if len(own) > 1:
            z = (own - own.mean(0)) / own.std(0, correction=0)
            expected = z @ made.prior.detach().double()
            torch.testing.assert_close(scores[n, line].double(), expected, rtol=1e-4, atol=1e-5)
            assert scores[n, line].argsort().tolist() == expected.argsort().tolist()
        else:
            assert (scores[n, line] == 0).all()
    assert (scores[~x["candidate"]] == -torch.inf).all()


def test_a_prior_of_recency_keeps_the_newest_however_large_the_ages_are():
    x = given()
    age = torch.arange(7).flip(0).float()
    for scale, shift in ((1, 0), (1e-3, 0), (1, 1e4)):
        x["features"][..., 2] = age * scale + shift
        made = make_student("mlp", **SIZES, prior=[0, 0, -1, 0, 0])
        order = made(**x).argsort(-1, descending=True)
        for n, line in enumerate(x["candidate"]):
            newest = line.nonzero().flatten().flip(0)
            assert order[n, : len(newest)].tolist() == newest.tolist()


def test_a_column_that_is_the_same_for_all_candidates_says_nothing():
    x, made = given(), student("set", trained=False)
    before = made(**x)
    x["features"][..., 1] = torch.tensor([0.1, 1e6, 3, 0, -7, 2]).unsqueeze(1)
    flat = made(**x)
    x["features"][..., 1] = 0.0
    assert torch.equal(flat, made(**x))
    assert not torch.equal(flat, before)


@every
def test_scores_move_with_their_frames(kind, embeddings):
    made, x = student(kind, embeddings), given()
    scores, order = made(**x), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    moved = x | {name: x[name][:, order] for name in ("features", "candidate")}
    torch.testing.assert_close(made(**moved), scores[:, order])


@every
def test_what_is_no_candidate_changes_nothing(kind, embeddings):
    made, x = student(kind, embeddings), given()
    scores = made(**x)
    for rubbish in (torch.nan, torch.inf, 1e9):
        absent = ~x["candidate"].unsqueeze(-1)
        other = x | {"features": x["features"].masked_fill(absent, rubbish)}
        assert torch.equal(made(**other), scores)
    wider = x | {
        "features": nn.functional.pad(x["features"], (0, 0, 0, 3), value=5.0),
        "candidate": nn.functional.pad(x["candidate"], (0, 3)),
    }
    torch.testing.assert_close(made(**wider)[:, :7], scores)


@every
def test_lists_of_none_or_one_candidate_make_no_nan(kind, embeddings):
    made, x = student(kind, embeddings), given()
    x["features"] = x["features"].masked_fill(~x["candidate"].unsqueeze(-1), torch.nan)
    scores = made(**x)
    assert scores[x["candidate"]].isfinite().all()
    scores[x["candidate"]].square().sum().backward()
    for name, value in made.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ["mlp", "set"])
def test_other_lists_of_the_batch_change_nothing(kind):
    made, x = student(kind), given()
    alone = [made(**{name: value[n : n + 1] for name, value in x.items()}) for n in range(6)]
    torch.testing.assert_close(torch.cat(alone), made(**x))


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_only_the_set_student_looks_at_other_frames(kind):
    x = given()
    n, u = 4, int(x["candidate"][4].nonzero()[0])
    other = x | {"features": x["features"].clone()}
    other["features"][n, u] += 1.0
    for own, seen in ((kind, False), ("set", True)):
        made = student(own)
        changed = made.parts(**other)[1] != made.parts(**x)[1]
        assert changed[n, u] and not changed[:n].any()
        changed[n, u] = False
        assert bool(changed.any()) == seen


def test_the_linear_student_is_one_product_for_each_head():
    for embeddings in (True, False):
        made, x = student("linear", embeddings), given()
        residual = made.parts(**x)[1]
        for n, u in x["candidate"].nonzero().tolist():
            line = int(x["layer"][n]) * H + int(x["head"][n]) if embeddings else 0
            z = (x["features"][n, u] - made.feature_mean) / made.feature_std
            expected = (z * made.weight[line]).sum() + made.bias[line]
            torch.testing.assert_close(residual[n, u], expected)


def test_blocks_of_the_set_student_are_those_of_torch():
    block = student("set").blocks[0]
    theirs = nn.TransformerEncoderLayer(
        32, 2, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    ours = {
        "self_attn.in_proj_": block.qkv,
        "self_attn.out_proj.": block.mix,
        "norm1.": block.norm,
        "norm2.": block.norm2,
        "linear1.": block.mlp[0],
        "linear2.": block.mlp[2],
    }
    theirs.load_state_dict(
        {f"{name}{kind}": getattr(own, kind) for name, own in ours.items() for kind in
         ("weight", "bias")}
    )  # fmt: skip
    x, present = torch.randn(3, 6, 32), torch.rand(3, 6) < 0.6
    present[:, 0] = True
    found = block(x, present[:, None, None].expand(-1, 1, 6, -1))
    torch.testing.assert_close(found, theirs(x, src_key_padding_mask=~present))


@pytest.mark.parametrize("kind", STUDENTS)
def test_without_embeddings_layer_and_head_change_nothing(kind):
    x = given()
    other = x | {"layer": (x["layer"] + 1) % L, "head": 1 - x["head"]}
    for embeddings in (True, False):
        made = student(kind, embeddings)
        same = torch.equal(made(**x), made(**other))
        assert same != embeddings


@pytest.mark.parametrize("kind", ["mlp", "set"])
def test_the_same_number_in_two_layers_is_two_heads(kind):
    made, x = student(kind), given()
    nn.init.zeros_(made.layer_embedding.weight)
    other = x | {"layer": (x["layer"] + 1) % L}
    changed = made(**x) != made(**other)
    assert torch.equal(changed, x["candidate"])


@every
def test_columns_may_be_measured_in_any_unit(kind, embeddings):
    made, x = student(kind, embeddings), given()
    scores = made(**x)
    scale, shift = torch.rand(K) * 5 + 0.1, torch.randn(K)
    made.standardise_by(
        made.feature_mean * scale + shift,
        made.feature_std * scale,
        made.context_mean * 2 - 1,
        made.context_std * 2,
    )
    other = x | {"features": x["features"] * scale + shift, "context": x["context"] * 2 - 1}
    torch.testing.assert_close(made(**other), scores, rtol=1e-3, atol=1e-4)


def test_a_column_without_deviation_is_only_centred():
    made, x = student("mlp", trained=False), given()
    nn.init.ones_(made.net[-1].weight)
    zero = torch.zeros(K), torch.zeros(C)
    made.standardise_by(zero[0] + 2, zero[0], zero[1], zero[1])
    first = made(**x)
    made.standardise_by(zero[0] + 2, zero[0] + 1, zero[1], zero[1] + 1)
    assert torch.equal(first, made(**x)) and first[x["candidate"]].isfinite().all()


@every
def test_settings_and_weights_make_the_same_student_again(kind, embeddings):
    made, x = student(kind, embeddings), given()
    again = make_student(**made.settings)
    assert again.settings == made.settings
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(**x), made(**x))


@every
def test_scores_are_float32_whatever_runs_around_them(kind, embeddings):
    made, x = student(kind, embeddings), given()
    scores = made(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(**x), scores)
    assert scores.dtype == torch.float32
    wide = x | {name: x[name].double() for name in ("features", "context")}
    assert torch.equal(made(**wide), scores)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"No student 'sets'. Did you mean 'set'\? Known: linear"):
        student("sets")
    with pytest.raises(ValueError, match="each of its 5 features, and was given as \\(4,\\)"):
        make_student("mlp", **SIZES, prior=[0.0] * 4)
    x = given()
    x["features"] = x["features"][..., 1:]
    with pytest.raises(ValueError, match="takes 5 features of a frame and 3 of a list, and was"):
        student("set")(**x)
