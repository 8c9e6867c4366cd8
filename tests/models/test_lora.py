"""LoRA: merged as strong as the programs that wrote it say, by these programs themselves."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_kv.models.checkpoints import read_checkpoint
from lightning_kv.models.loading import identity
from lightning_kv.models.names import to_original
from lightning_kv.models.strength import matching
from lightning_kv.models.wan import CausalWan, WanConfig

TINY = WanConfig(dim=64, ffn_dim=128, layers=2, heads=2, text_dim=16, latent_size=(4, 6))
CASES = Path(__file__).parents[3] / "shared" / "cases"
MODULES = [f"blocks.{b}.{x}" for b in (0, 1) for x in ("self_attn.q", "cross_attn.o", "ffn.2")]

pytestmark = [  # of PEFT, about patterns for modules of the other naming, and LoRA of biases
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
]
here = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")


def random_weights():
    rng = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in CausalWan(TINY).state_dict().items()}
    return {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}


WEIGHTS = random_weights()


@pytest.fixture
def base(tmp_path):
    """A file with weights in which every number differs."""
    save_file(WEIGHTS, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def products(modules=MODULES, rank=4, names=("{}.lora_A.weight", "{}.lora_B.weight")):
    """Matrices for modules under original names."""
    rng, found = torch.Generator().manual_seed(1), {}
    for module in modules:
        out, width = WEIGHTS[f"{module}.weight"].shape
        for name, shape in zip(names, ((rank, width), (out, rank)), strict=True):
            found[name.format(module)] = torch.randn(shape, generator=rng) * 0.1
    return found


def put(folder, tensors, config=None, header=None, name="adapter_model.safetensors"):
    """A LoRA in a folder, and what is said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, header)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
    return folder


def check_delta(found, deltas, tolerance=1e-6):
    """That weights are the base with these differences, and the others the base itself."""
    assert deltas and max(delta.abs().max() for delta in deltas.values()) > 0.01
    for name, weight in found.tensors.items():
        if name in deltas:
            delta = deltas[name].reshape(weight.shape).double()
            off = (weight.double() - WEIGHTS[name].double() - delta).abs().max()
            assert off <= tolerance, f"{name} is off by {off}"
        else:
            assert torch.equal(weight, WEIGHTS[name]), name


# -- PEFT writes -----------------------------------------------------------------------------


def peft_model(naming, **given):
    """A network under PEFT, with random matrices."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    network = CausalWan(TINY) if naming == "original" else theirs()
    torch.manual_seed(2)
    model = peft.get_peft_model(network, peft.LoraConfig(init_lora_weights=False, **given))
    for name, weight in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def theirs():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=16,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=32,
    )


def peft_deltas(model, prefix="base_model.model."):
    """What PEFT itself adds to which weight, under original names."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            own = name.removeprefix(prefix)
            own = own if f"{own}.weight" in WEIGHTS else to_original(f"{own}.weight")[:-7]
            found[f"{own}.weight"] = layer.get_delta_weight("default").detach()
            if layer.lora_bias["default"]:
                bias = layer.lora_B["default"].bias.detach() * layer.scaling["default"]
                found[f"{own}.bias"] = bias
    return found


PATTERNS = {
    "none": ({}, {}),
    "alphas": ({}, {"ffn.0|to_q": 3, r"blocks\.1\.(self_attn|attn1)\.(to_out.0|o)": 24}),
    "ranks": ({"ffn.[02]|proj_out": 2, "^blocks.0.*(q|net.2)": 7}, {}),
    "both": ({".*attn.*": 3}, {"blocks.0.ffn.2|blocks.1.ffn.net.2": 5, "ffn.0": 1}),
}
TARGETS = {
    "original": ["q", "o", "ffn.0", "ffn.2", "patch_embedding", "text_embedding.0"],
    "diffusers": ["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out"],
}


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 4, 12])
@pytest.mark.parametrize("naming", TARGETS)
def test_what_peft_writes_is_as_strong_as_in_peft(tmp_path, base, naming, alpha, rslora, patterns):
    ranks, alphas = PATTERNS[patterns]
    model = peft_model(
        naming,
        r=4,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=TARGETS[naming],
    )
    model.save_pretrained(tmp_path / "peft")
    expected = peft_deltas(model)
    folder = read_checkpoint(base, lora=tmp_path / "peft")
    file = read_checkpoint(base, lora=tmp_path / "peft" / "adapter_model.safetensors")
    for found in (folder, file):
        check_delta(found, expected)
        assert found.strength.origin == "adapter_config.json" and not found.strength.notes
    assert (folder.lora, file.lora) == ("peft", "adapter_model.safetensors")
    config = (tmp_path / "peft" / "adapter_config.json").read_bytes()
    assert folder.strength.config_sha256 == hashlib.sha256(config).hexdigest()
    scales = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert sorted(folder.strength.scales.values()) == pytest.approx(sorted(scales.values()))


def test_peft_in_a_torch_file_with_biases_and_other_adapter_names(tmp_path, base):
    model = peft_model("original", r=4, lora_alpha=6, lora_bias=True, target_modules=["k", "ffn.0"])
    model.save_pretrained(tmp_path / "peft", safe_serialization=False)
    assert (tmp_path / "peft" / "adapter_model.bin").is_file()
    expected = peft_deltas(model)
    assert sum(name.endswith("bias") for name in expected) == 6
    check_delta(read_checkpoint(base, lora=tmp_path / "peft"), expected)
    raw = {name: t for name, t in model.state_dict().items() if "lora_" in name}
    assert any("lora_B.default.bias" in name for name in raw)
    torch.save(raw, tmp_path / "peft" / "raw.pt")
    check_delta(read_checkpoint(base, lora=tmp_path / "peft" / "raw.pt"), expected)


def test_of_several_patterns_the_first_in_the_file_counts_as_in_peft(tmp_path, base):
    """PEFT trains by the order they were given in, and writes and reads them in the alphabet's."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    patterns = {"ffn.0": 1, "blocks.1.*": 24}
    model = peft_model("original", r=4, alpha_pattern=patterns, target_modules=["ffn.0", "q"])
    model.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(CausalWan(TINY), tmp_path / "peft")
    found = read_checkpoint(base, lora=tmp_path / "peft")
    check_delta(found, peft_deltas(again))
    (note,) = found.strength.notes
    assert "several patterns for blocks.1.ffn.0. The first in the file counts, as in PEFT" in note
    ranks = {"ffn.0": 2, "blocks.1.*": 3}
    model = peft_model("original", r=4, rank_pattern=ranks, target_modules=["ffn.0", "q"])
    model.save_pretrained(tmp_path / "ranks")
    found = read_checkpoint(base, lora=tmp_path / "ranks")
    check_delta(found, peft_deltas(model))
    assert not found.strength.notes


def test_patterns_are_read_as_peft_reads_them():
    other = pytest.importorskip("peft.utils.other", reason="PEFT is not installed")
    if not hasattr(other, "get_pattern_key"):
        pytest.skip("this PEFT has its rule for patterns elsewhere")
    names = ["blocks.0.ffn.0", "blocks.10.ffn.0", "model.blocks.1.attn1.to_out.0", "head.head"]
    tried = ["0", "ffn.0", "fn.0", "^ffn.0", "^blocks.0.*", "blocks.1", "head", r"blocks\.\d+\..*"]
    tried += ["ffn.2|to_out.0", "", "head.head$", "(ffn|attn1).*", "blocks.(0|1).ffn.0"]
    for name in names:
        for first in tried:
            for second in tried:
                patterns = {first: 1, second: 2}
                expected = patterns.get(other.get_pattern_key(patterns, name), 3)
                assert [*matching(patterns, name), 3][0] == expected, (patterns, name)


@pytest.mark.parametrize(
    ("kind", "given", "said", "held"),
    [
        ("LoraConfig", {"use_dora": True}, r"DoRA \(use_dora\)", "DoRA"),
        ("LoraConfig", {"bias": "lora_only"}, r"biases that were trained .*'lora_only'", None),
        ("LoraConfig", {"modules_to_save": ["head.head"]}, "whole modules", "whole weights"),
        ("LoraConfig", {"init_lora_weights": "pissa"}, "base weights of its own.*'pissa'", None),
        ("LoraConfig", {"init_lora_weights": "olora"}, "base weights of its own.*'olora'", None),
        ("LoHaConfig", {}, "peft_type LOHA", "LoHa"),
        ("LoKrConfig", {}, "peft_type LOKR", "LoKr"),
        ("OFTConfig", {"oft_block_size": 4, "r": 0}, "peft_type OFT", "OFT"),
        ("IA3Config", {"feedforward_modules": []}, "peft_type IA3", "IA3"),
    ],
)
def test_other_formats_of_peft_are_refused_by_name(tmp_path, base, kind, given, said, held):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = getattr(peft, kind)(target_modules=["q", "ffn.0"], **given)
    peft.get_peft_model(CausalWan(TINY), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=rf"adapter_config.json describes {said}") as error:
        read_checkpoint(base, lora=tmp_path / "peft")
    assert "Merge it with the program that wrote it" in str(error.value)
    (tmp_path / "peft" / "adapter_config.json").unlink()
    if held is not None:  # the matrices alone show it too
        with pytest.raises(ValueError, match=f"no LoRA of plain .*holds {held}"):
            read_checkpoint(base, lora=tmp_path / "peft")


# -- diffusers writes ------------------------------------------------------------------------


@pytest.fixture
def transformer():
    """diffusers' own network, with the weights of the base."""
    network = theirs()
    held = {to_original(name): name for name in network.state_dict()}
    network.load_state_dict({held[name]: weight for name, weight in WEIGHTS.items()})
    return network


def fused(network):
    """diffusers' own sum, as differences under original names."""
    network.fuse_lora()
    network.unload_lora()
    new = {to_original(name): weight for name, weight in network.state_dict().items()}
    deltas = {name: (new[name] - weight).detach() for name, weight in WEIGHTS.items()}
    return {name: delta for name, delta in deltas.items() if delta.any()}


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("writer", ["adapter", "pipeline"])
def test_what_diffusers_writes_is_as_strong_as_in_diffusers(
    tmp_path, base, transformer, writer, rslora, patterns
):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from diffusers import WanPipeline

    ranks, alphas = PATTERNS[patterns]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        init_lora_weights=False,
        target_modules=TARGETS["diffusers"],
    )
    torch.manual_seed(3)
    transformer.add_adapter(config)
    if writer == "adapter":
        transformer.save_lora_adapter(tmp_path / "lora")
    else:
        told = transformer.peft_config["default"].to_dict()
        told = {k: list(v) if isinstance(v, set) else v for k, v in told.items()}
        WanPipeline.save_lora_weights(
            tmp_path / "lora",
            transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=told,
        )
    found = read_checkpoint(base, lora=tmp_path / "lora")
    assert found.strength.origin == "header" and found.strength.config_sha256 is None
    check_delta(found, fused(transformer))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_files_of_comfyui_are_read_as_diffusers_reads_them(tmp_path, base, transformer, alpha):
    pytest.importorskip("peft", reason="PEFT is not installed")
    from diffusers import WanPipeline

    names = [f"diffusion_model.{{}}.lora_{side}.weight" for side in ("down", "up")]
    tensors = products(names=names)
    tensors |= {
        f"diffusion_model.{m}.diff_b": torch.randn(WEIGHTS[f"{m}.bias"].shape) for m in MODULES
    }
    if alpha is not None:
        tensors |= {f"diffusion_model.{m}.alpha": torch.tensor(alpha) for m in MODULES}
    file = put(tmp_path / "comfy", tensors, name="wan.safetensors")
    state, told = WanPipeline.lora_state_dict(
        str(file), weight_name="wan.safetensors", return_lora_metadata=True
    )
    WanPipeline.load_lora_into_transformer(state, transformer, "default", told)
    found = read_checkpoint(base, lora=file / "wan.safetensors")
    check_delta(found, fused(transformer))
    assert str(found.strength) == ("1" if alpha is None else "1.5")
    assert found.strength.origin == ("alpha = rank, unsaid" if alpha is None else "alpha tensors")
    assert bool(found.strength.notes) == (alpha is None)


def test_files_of_kohya_are_read_as_diffusers_reads_them(tmp_path, base, transformer):
    pytest.importorskip("peft", reason="PEFT is not installed")
    from diffusers import WanPipeline

    linear = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"]
    modules = [f"blocks.{b}.{x}" for b in (0, 1) for x in [*linear, "ffn.0", "ffn.2"]]
    tensors = {
        f"lora_unet_{name.partition('/')[0].replace('.', '_')}.{name.partition('/')[2]}": matrix
        for name, matrix in products(
            modules, names=("{}/lora_down.weight", "{}/lora_up.weight")
        ).items()
    }
    tensors |= {f"lora_unet_{m.replace('.', '_')}.alpha": torch.tensor(3) for m in modules}
    file = put(tmp_path / "kohya", tensors, name="wan.safetensors")
    state = WanPipeline.lora_state_dict(str(file), weight_name="wan.safetensors")
    WanPipeline.load_lora_into_transformer(state, transformer, "default")
    found = read_checkpoint(base, lora=file)
    check_delta(found, fused(transformer))
    assert set(found.strength.scales.values()) == {0.75}
    assert f"{modules[0]}" in found.strength.scales


# -- differences -----------------------------------------------------------------------------


def test_differences_are_added_as_they_are(tmp_path, base):
    tensors = products(["blocks.0.ffn.0"], names=("{}.lora_down.weight", "{}.lora_up.weight"))
    product = tensors["blocks.0.ffn.0.lora_up.weight"] @ tensors["blocks.0.ffn.0.lora_down.weight"]
    tensors["blocks.0.ffn.0.alpha"] = torch.tensor(8.0)
    expected = {"blocks.0.ffn.0.weight": 2 * product}
    for parameter, name in {
        "blocks.0.ffn.0.weight": "blocks.0.ffn.0.diff",
        "blocks.0.ffn.0.bias": "blocks.0.ffn.0.diff_b",
        "blocks.1.norm3.weight": "blocks.1.norm3.diff",
        "blocks.1.norm3.bias": "blocks.1.norm3.diff_b",
        "blocks.1.self_attn.norm_q.weight": "blocks.1.self_attn.norm_q.diff",
        "blocks.1.modulation": "blocks.1.modulation.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "head.modulation": "head.modulation.diff",
    }.items():
        tensors[name] = torch.randn(WEIGHTS[parameter].shape)
        expected[parameter] = expected.get(parameter, 0) + tensors[name]
    named = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    found = read_checkpoint(base, lora=put(tmp_path / "a", named))
    check_delta(found, expected)
    assert dict(found.strength.scales) == {"blocks.0.ffn.0": 2.0}
    only = {name: tensor for name, tensor in named.items() if "ffn" not in name}
    found = read_checkpoint(base, lora=put(tmp_path / "b", only))
    check_delta(found, {k: v for k, v in expected.items() if "ffn" not in k})
    assert (str(found.strength), found.strength.origin) == ("1", "differences")
    assert found.strength.notes == ()


# -- who says it -----------------------------------------------------------------------------


def strength_of(base, *given, **more):
    found = read_checkpoint(base, lora=put(*given, **more))
    product = products()
    deltas = {}
    for module in MODULES:
        up, down = (product[f"{module}.lora_{side}.weight"] for side in "BA")
        deltas[f"{module}.weight"] = found.strength.scales[module] * (up @ down)
    check_delta(found, deltas)
    return found


def test_every_place_is_asked_and_silence_is_said(tmp_path, base):
    lora, config = products(), {"r": 4, "lora_alpha": 8}
    rooted = config | {"use_rslora": True}
    header = {"lora_adapter_metadata": json.dumps(config)}
    prefixed = {f"transformer.{name}": value for name, value in rooted.items()}
    piped = {"lora_adapter_metadata": json.dumps(prefixed)}
    trained = {"lora_config": json.dumps({"r": 4, "lora_alpha": 2, "target_modules": ["q"]})}
    alphas = {f"{module}.alpha": torch.tensor([12]) for module in MODULES}
    tried = [
        (lora, config, None, "2", "adapter_config.json"),
        (lora, rooted, None, "4", "adapter_config.json"),
        (lora, None, header, "2", "header"),
        (lora, None, piped, "4", "header"),
        (lora, None, trained, "0.5", "header"),
        (lora | alphas, None, None, "3", "alpha tensors"),
        (lora, config, header, "2", "adapter_config.json and header"),
        (lora, None, None, "1", "alpha = rank, unsaid"),
        (lora, {"peft_type": "LORA", "r": 4}, None, "1", "alpha = rank, unsaid"),
        (lora, config, {"format": "pt", "ss_network_alpha": "1"}, "2", "adapter_config.json"),
    ]
    for index, (tensors, beside, inside, strength, origin) in enumerate(tried):
        found = strength_of(base, tmp_path / str(index), tensors, beside, inside)
        assert (str(found.strength), found.strength.origin) == (strength, origin)
        assert bool(found.strength.notes) == (strength == "1")
        told = identity(found, "float32")
        assert (told["lora_strength"], told["lora_strength_by"]) == (strength, origin)
        assert ("lora_config" in told) == ("adapter_config" in origin)
    assert found.strength.notes == ()
    (note,) = strength_of(base, tmp_path / "n", lora).strength.notes
    assert note.startswith(f"The LoRA {tmp_path / 'n' / 'adapter_model.safetensors'} does not say")
    assert "how strong its products are" in note
    assert "(alpha = rank)" in note
    (note,) = strength_of(
        base, tmp_path / "p", lora, {"alpha_pattern": {"ffn.2": 8}, "rank_pattern": None}
    ).strength.notes
    assert "how strong 4 of its 6 products are" in note


def test_strengths_that_vary_are_told_apart(tmp_path, base):
    told = set()
    for index, patterns in enumerate(({"ffn.2": 8}, {"blocks.0.ffn.2": 8}, {"blocks.1.ffn.2": 8})):
        config = {"r": 4, "lora_alpha": 2, "alpha_pattern": patterns}
        found = strength_of(base, tmp_path / str(index), products(), config)
        assert str(found.strength).startswith("0.5 to 2 (")
        told.add(identity(found, "float32")["lora_strength"])
    assert len(told) == 3


def test_patterns_are_about_the_names_that_were_trained(tmp_path, base):
    """PEFT saw `model.blocks...` where a wrapper was around the network."""
    lora = {f"base_model.model.model._fsdp_wrapped_module.{k}": v for k, v in products().items()}
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {"^model.blocks.0.*": 8, "^blocks.1.*": 2}}
    found = strength_of(base, tmp_path / "a", lora, config)
    assert {scale for m, scale in found.strength.scales.items() if ".0." in m[:9]} == {2.0}
    assert {scale for m, scale in found.strength.scales.items() if ".1." in m[:9]} == {1.0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": 0}, r"lora_alpha as 0, which is no strength.*above 0"),
        ({"lora_alpha": -8}, "lora_alpha as -8, which is no strength"),
        ('{"lora_alpha": NaN}', "lora_alpha as nan, which is no strength"),
        ({"lora_alpha": "8"}, "lora_alpha as '8', which is no strength"),
        ({"lora_alpha": True}, "lora_alpha as True, which is no strength"),
        ({"lora_alpha": 8, "r": 0}, "gives r as 0, which is no rank"),
        ({"lora_alpha": 8, "r": 2.5}, "gives r as 2.5, which is no rank"),
        ({"lora_alpha": 8, "r": 16}, r"says rank 16 for '\S+', and its matrices have 4.*folder"),
        ({"lora_alpha": 8, "r": 4, "rank_pattern": {"ffn.2": 2}}, r"rank 2 for 'blocks.0.ffn.2'"),
        ({"lora_alpha": 8, "rank_pattern": {"q": "2"}}, r"rank_pattern\['q'\] as '2'"),
        ({"lora_alpha": 8, "alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] as -1"),
        ({"lora_alpha": 8, "alpha_pattern": ["q"]}, r"alpha_pattern as \['q'\].*maps"),
        ({"lora_alpha": 8, "alpha_pattern": {"q(": 1}}, r"alpha_pattern as .*regular expressions"),
        ({"lora_alpha": 8, "use_rslora": "yes"}, "use_rslora as 'yes'"),
        ({"use_rslora": True}, r"use_rslora and no lora_alpha.*Add the lora_alpha"),
        ({"lora_alpha": 8, "fan_in_fan_out": True}, "transposed layers .fan_in_fan_out"),
        ('{"lora_alpha": 8', "is no table of settings.*copy it again"),
        ("[8]", "is no table of settings: it is a list"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "header"])
def test_settings_that_are_none(tmp_path, base, config, said, place):
    text = config if isinstance(config, str) else json.dumps(config)
    where = {"config": text} if place == "beside" else {"header": {"lora_adapter_metadata": text}}
    lora = put(tmp_path / "lora", products(), **where)
    with pytest.raises(ValueError, match=said) as error:
        read_checkpoint(base, lora=lora)
    named = "adapter_config.json" if place == "beside" else "The entry lora_adapter_metadata in"
    assert named in str(error.value) and str(lora) in str(error.value)


def test_contradictions_are_refused(tmp_path, base):
    lora, config = products(), {"lora_alpha": 8}
    alphas = {f"{module}.alpha": torch.tensor(4.0) for module in MODULES}
    header = {"lora_adapter_metadata": json.dumps({"lora_alpha": 16})}
    for index, given in enumerate([(lora | alphas, config), (lora, config, header)]):
        with pytest.raises(ValueError, match=r"contradictory: .* 2 by its adapter_config\.json"):
            read_checkpoint(base, lora=put(tmp_path / str(index), *given))
    rounded = {name: torch.tensor(7.97).bfloat16() for name in alphas}  # 7.96875
    config = {"lora_alpha": 7.97}
    assert str(strength_of(base, tmp_path / "r", lora | rounded, config).strength) == "1.9925"
    both = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 4}
    header = {"lora_adapter_metadata": json.dumps(both)}
    named = {f"transformer.{name}": tensor for name, tensor in lora.items()}
    assert str(strength_of(base, tmp_path / "b", named, None, header).strength) == "2"
    renamed = {f"diffusion_model.{name}": tensor for name, tensor in lora.items()}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    assert str(strength_of(base, tmp_path / "d", renamed, None, header).strength) == "2"


FIRST = MODULES[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{FIRST}.alpha": torch.tensor(0.0)}, r"self_attn\.q\.alpha as 0\.0.*no strength"),
        ({f"{FIRST}.alpha": torch.tensor(-1.0)}, r"self_attn\.q\.alpha as -1\.0"),
        ({f"{FIRST}.alpha": torch.tensor(float("nan"))}, r"self_attn\.q\.alpha as nan"),
        ({f"{FIRST}.lora_A.weight": torch.full((4, 64), float("inf"))}, "not finite in down of"),
        (
            {f"{FIRST}.lora_A.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn)},
            "down of blocks.*float8_e4m3fn, which is quantised",
        ),
        ({f"{FIRST}.dora_scale": torch.ones(64, 1)}, "holds DoRA: blocks"),
        ({f"{FIRST}.lora_magnitude_vector": torch.ones(64)}, "holds DoRA: blocks"),
        ({f"{FIRST}.hada_w1_a": torch.ones(64, 4)}, "holds LoHa: blocks"),
        ({f"{FIRST}.lokr_w1": torch.ones(4, 4)}, "holds LoKr: blocks"),
        ({f"{FIRST}.lora_mid.weight": torch.ones(4, 4)}, "in three parts: blocks"),
        ({"head.head.weight": torch.ones(64, 64)}, r"whole weights.*: head\.head\.weight"),
        (
            {f"text_encoder.x.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
            r"adapts text_encoder\.x, which is no part of a Wan transformer",
        ),
        ({f"{FIRST}.lora_A.weight": torch.ones(4)}, "an unknown kind or shape: blocks"),
        ({f"{FIRST}.diff_b": torch.ones(63)}, r"adds \[63\] to '\S+q\.bias', which is \[64\]"),
        ({"blocks.0.self_attn.norm_q.diff_b": torch.ones(64)}, "which does not exist here"),
        ({f"{FIRST}.lora_down.weight": torch.ones(4, 64)}, "holds down of .* twice"),
        ({"blocks.0.attn1.to_q.diff": torch.ones(64, 64)}, "under two names"),
        ({"blocks.9.ffn.0.diff": torch.ones(64)}, "have 2 layers.*deeper network"),
        ({"lora_unet_blocks_9_ffn_0.diff": torch.ones(64)}, "have 2 layers.*deeper network"),
        ({"blocks.0.cross_attn.k_img.diff": torch.ones(64)}, "only image-to-video networks"),
        ({"layer1.0.conv1.diff": torch.ones(64)}, "'?layer1.0.conv1'?, which is no part of a Wan"),
        ({"blocks.1.ffn.0.alpha": torch.tensor(1.0)}, r"blocks\.1\.ffn\.0 \(alpha or bias only"),
        (
            {"a.x.head.head.diff": torch.ones(1), "a.y.head.head.diff": torch.ones(1)},
            None,
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, base, change, said):
    if said is None:
        tensors, said = change, r"several prefixes: a\.x \(1\), a\.y \(1\)\. Give a file with one"
    else:
        tensors = products() | change
    with pytest.raises(ValueError, match=said) as error:
        read_checkpoint(base, lora=put(tmp_path / "lora", tensors))
    assert str(tmp_path / "lora") in str(error.value)


def test_a_torch_file_without_matrices_is_named(tmp_path, base):
    matrices = products()
    said = r"holds no table of matrices, but critic_lora, step.*generator_lora or state_dict"
    torch.save({"critic_lora": matrices, "step": 7}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=said):
        read_checkpoint(base, lora=tmp_path / "lora.pt")
    torch.save([1], tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="holds no table of matrices, but a list"):
        read_checkpoint(base, lora=tmp_path / "lora.pt")
    named = {f"generator.model.base_model.model.{name}": t for name, t in matrices.items()}
    torch.save({"state_dict": named, "epoch": 3}, tmp_path / "lora.ckpt")
    found = read_checkpoint(base, lora=tmp_path / "lora.ckpt")
    assert set(found.strength.scales) == set(MODULES)


# -- as users meet them ----------------------------------------------------------------------


@pytest.fixture
def case_base(tmp_path):
    save_file(WEIGHTS, tmp_path / "case.safetensors")
    return tmp_path / "case.safetensors"


@here
@pytest.mark.parametrize(
    ("lora", "strength", "origin"),
    [
        ("peft_original", "2", "adapter_config.json"),
        ("peft_original/adapter_model.safetensors", "2", "adapter_config.json"),
        ("peft", "2", "adapter_config.json"),
        ("peft_diffusers_names", "1", "adapter_config.json"),
        ("diff", "2", "header"),
        ("diffusers", "1", "alpha = rank, unsaid"),
        ("comfy", "1", "alpha = rank, unsaid"),
        ("plain_alpha", "2", "alpha tensors"),
        ("longlive_like.pt", "1", "alpha = rank, unsaid"),
        ("longlive_step.pt", "1", "alpha = rank, unsaid"),
    ],
)
def test_loras_that_users_meet(case_base, lora, strength, origin):
    path = CASES / "lora" / lora
    found = read_checkpoint(case_base, lora=path)
    assert (str(found.strength), found.strength.origin) == (strength, origin)
    if path.suffix == ".pt":
        held = torch.load(path, weights_only=True)["generator_lora"]
    else:
        held = load_file(path if path.is_file() else next(path.glob("*.safetensors")))
    deltas = {}
    for name, down in held.items():
        if ".lora_A" in name:
            module = name.partition(".lora_A")[0]
            module = f"blocks.{module.partition('blocks.')[2]}.weight"
            module = module if module in WEIGHTS else to_original(module)
            deltas[module] = float(strength) * held[name.replace("lora_A", "lora_B")] @ down
    check_delta(found, deltas)


@here
@pytest.mark.parametrize("name", ["peft_original", "peft_diffusers_names"])
def test_loras_that_users_meet_are_as_strong_as_in_peft(case_base, name):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    folder = CASES / "lora" / name
    told = json.loads((folder / "adapter_config.json").read_text())
    network = CausalWan(TINY) if name == "peft_original" else theirs()
    names = load_file(folder / "adapter_model.safetensors")
    modules = {n.partition(".lora_")[0].removeprefix("base_model.model.") for n in names}
    config = peft.LoraConfig(r=told["r"], lora_alpha=told["lora_alpha"], target_modules=modules)
    model = peft.get_peft_model(network, config)
    peft.set_peft_model_state_dict(model, names)
    check_delta(read_checkpoint(case_base, lora=folder), peft_deltas(model))


@here
@pytest.mark.parametrize("name", ["lightning.ckpt", "comfy_full.safetensors"])
def test_checkpoints_behind_a_prefix_that_users_meet(name):
    found = read_checkpoint(CASES / "ckpt" / name)
    assert found.tensors.keys() == WEIGHTS.keys() and found.format == "original"


@here
def test_a_quantised_checkpoint_that_users_meet_stays_refused():
    with pytest.raises(ValueError, match="quantised"):
        read_checkpoint(CASES / "ckpt" / "fp8_e4m3fn_scaled.safetensors")
