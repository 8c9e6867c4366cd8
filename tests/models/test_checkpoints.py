"""Checkpoints: every published wrapping gives the same weights, and bad files are said in words."""

import hashlib
import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.models import CausalWan, WanConfig, build_model
from lightning_kv.models import checkpoints as module
from lightning_kv.models.checkpoints import (
    infer_sizes,
    load_into,
    looks_like,
    read_checkpoint,
    save_checkpoint,
)
from lightning_kv.models.lora import merge_lora
from lightning_kv.models.names import to_diffusers, to_original, unwrap
from lightning_kv.policies.registry import preset

TINY = WanConfig(
    dim=64, ffn_dim=128, layers=2, heads=2, text_dim=32, text_len=12, latent_size=(4, 6)
)


def random_weights(config=TINY, seed=0, dtype=torch.float32):
    """All weights random, norms too, so that no two names can be mixed up unseen."""
    rng = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in CausalWan(config).state_dict().items()}
    return {k: (torch.randn(s, generator=rng) * 0.2).to(dtype) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def weights():
    return random_weights()


def theirs(config, **more):
    """diffusers' network of the same size."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        text_dim=config.text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        **more,
    )


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left
    )


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b"])
def test_names_and_shapes_are_those_of_diffusers(name):
    ours = build_model(name, "meta")
    with torch.device("meta"):
        other = theirs(ours.config).state_dict()
    ours = {k: v.shape for k, v in ours.state_dict().items()}
    other = {k: v.shape for k, v in other.items()}
    assert {to_diffusers(k): shape for k, shape in ours.items()} == other
    assert {to_original(k): shape for k, shape in other.items()} == ours
    assert all(to_original(to_diffusers(k)) == k for k in ours)
    if name == "wan-1.3b":
        assert len(other) == 825
        assert sum(shape.numel() for shape in other.values()) == 1_418_996_800


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("blocks.3.norm3.weight", "blocks.3.norm2.weight"),  # the only name they both use
        ("blocks.29.self_attn.norm_k.weight", "blocks.29.attn1.norm_k.weight"),
        ("blocks.10.cross_attn.o.bias", "blocks.10.attn2.to_out.0.bias"),
        ("blocks.0.cross_attn.v.weight", "blocks.0.attn2.to_v.weight"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight"),
        ("blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"),
        ("blocks.1.modulation", "blocks.1.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.bias", "proj_out.bias"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
        ("time_embedding.2.bias", "condition_embedder.time_embedder.linear_2.bias"),
        ("text_embedding.0.weight", "condition_embedder.text_embedder.linear_1.weight"),
    ],
)
def test_names_with_the_same_shape_are_not_mixed_up(original, diffusers):
    assert to_diffusers(original) == diffusers
    assert to_original(diffusers) == original


@pytest.mark.parametrize(
    ("translate", "key", "said"),
    [
        (to_diffusers, "blocks.4.self_attn.qq.weight", r"mean 'blocks.4.self_attn.q.weight'"),
        (to_diffusers, "blocks.4.attn1.to_q.weight", "no original name"),
        (to_diffusers, "xblocks.4.norm3.weight", "no original name"),
        (to_diffusers, "blocks.4.norm3.weight.x", r"Did you mean 'blocks.4.norm3.weight'"),
        (to_diffusers, "blocks.04.norm3.weight", "no original name"),
        (to_original, "blocks.4.norm3.weight", r"Did you mean 'blocks.4.norm2.weight'"),
        (to_original, "proj_ou.weight", r"Did you mean 'proj_out.weight'"),
        (to_diffusers, "blocks.0.cross_attn.k_img.weight", "image-to-video"),
        (to_diffusers, "img_emb.proj.1.weight", "image-to-video"),
        (to_original, "blocks.0.attn2.add_v_proj.bias", "image-to-video"),
        (to_original, "blocks.0.attn2.norm_added_k.weight", "image-to-video"),
        (to_original, "condition_embedder.image_embedder.norm1.bias", "image-to-video"),
    ],
)
def test_unknown_names_are_refused(translate, key, said):
    with pytest.raises(ValueError, match=said):
        translate(key)


INFIXES = ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."]
PREFIXES = ["module.", "model.", "base_model.model.", *INFIXES]
NAMES = st.sampled_from(sorted(random_weights()))


@given(NAMES, st.lists(st.sampled_from(PREFIXES), max_size=6), st.data())
def test_any_stack_of_wrappings_comes_off(name, prefixes, data):
    parts = name.split(".")
    inside = [
        "".join(data.draw(st.lists(st.sampled_from(INFIXES), max_size=2))) + part for part in parts
    ]
    assert unwrap("".join(prefixes) + ".".join(inside)) == name
    assert unwrap(name) == name


def test_only_whole_parts_of_a_name_are_taken_off():
    for name in ("my_model.weight", "modules.weight", "blocks.0.model.weight", "base_model.weight"):
        assert unwrap(name) == name


# -- reading ---------------------------------------------------------------------------------


WRAPPINGS = {
    "bare": lambda k: k,
    "model": lambda k: f"model.{k}",
    "fsdp": lambda k: f"model._fsdp_wrapped_module.{k}",
    "checkpointed": lambda k: "model." + k.replace(".", "._checkpoint_wrapped_module.", 1),
    "compiled twice": lambda k: f"_orig_mod.module.model._orig_mod.{k}",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("container", ["flat.pt", "keyed.pth", "legacy.bin", "one", "shards"])
def test_every_container_gives_the_same_weights(tmp_path, weights, container, naming, wrapping):
    wrap = WRAPPINGS[wrapping]
    rename = to_diffusers if naming == "diffusers" else str
    named = {wrap(rename(k)): v for k, v in weights.items()}
    path, kind = tmp_path / container, "pt"
    if container == "flat.pt":
        torch.save(named, path)
    elif container == "legacy.bin":
        torch.save(named, path, _use_new_zipfile_serialization=False)
    elif container == "keyed.pth":
        torch.save({"generator": named, "step": 3, "critic": {"w": torch.zeros(1)}}, path)
    elif container == "one":
        path, kind = tmp_path / "krea.safetensors", "safetensors"
        save_file(named, path)
    else:
        kind = "folder"
        write_shards(path, named)
    found = read_checkpoint(path)
    assert same(found.tensors, weights)
    key = "generator" if container == "keyed.pth" else None
    assert (found.format, found.container, found.key) == (naming, kind, key)
    if kind != "folder":
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def write_shards(folder, named, parts=3):
    folder.mkdir()
    names, where = sorted(named), {}
    for part in range(parts):
        file = f"model-{part}.safetensors"
        own = names[part::parts]
        save_file({k: named[k] for k in own}, folder / file)
        where |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_folders_that_diffusers_writes(tmp_path, weights, pipeline, shard):
    model = theirs(TINY)
    model.load_state_dict({to_diffusers(k): v for k, v in weights.items()})
    folder = tmp_path / "transformer" if pipeline else tmp_path
    model.save_pretrained(folder, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "300KB")
    found = read_checkpoint(tmp_path)
    assert same(found.tensors, weights)
    assert (found.format, found.container, found.key) == ("diffusers", "folder", None)


def test_the_hash_of_shards_is_that_of_the_list_of_their_hashes(tmp_path, weights):
    write_shards(tmp_path / "m", weights)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert read_checkpoint(tmp_path / "m").sha256 == expected
    index = tmp_path / "m" / "model.safetensors.index.json"
    assert read_checkpoint(index).sha256 == expected


def test_the_averaged_weights_are_preferred_and_any_entry_can_be_asked_for(tmp_path, weights):
    order = ["generator_ema", "generator", "model", "state_dict"]
    sets = {key: {k: v + i for k, v in weights.items()} for i, key in enumerate(order)}
    path = tmp_path / "w.pt"
    for first in range(len(order)):
        torch.save({"step": 1} | {key: sets[key] for key in reversed(order[first:])}, path)
        found = read_checkpoint(path)
        assert found.key == order[first] and same(found.tensors, sets[order[first]])
    torch.save({**sets, "critic": weights}, path)
    for key in order:
        assert same(read_checkpoint(path, key).tensors, sets[key])
    with pytest.raises(ValueError, match=r"no entry 'ema'.*generator_ema, generator, model"):
        read_checkpoint(path, "ema")
    torch.save(weights, path)
    with pytest.raises(ValueError, match="Leave out the key"):
        read_checkpoint(path, "generator")
    torch.save({"generator": {"a": 1}}, path)
    with pytest.raises(ValueError, match=r"'generator' of .* is not a table of tensors"):
        read_checkpoint(path)


# -- what cannot be read ---------------------------------------------------------------------


def fails(path, said, **how):
    with pytest.raises(ValueError, match=said):
        read_checkpoint(path, **how)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 0.1, 0.5, 0.99])
def test_a_torch_file_that_is_cut_off(tmp_path, weights, kept, legacy):
    path = tmp_path / "w.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    kept = kept if isinstance(kept, int) else int(kept * len(data))
    path.write_bytes(data[:kept])
    fails(path, rf"\({kept} bytes\) cannot be read as a torch file.*copy it again")


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, -1])
def test_a_safetensors_file_that_is_cut_off(tmp_path, weights, kept):
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    fails(path, "cannot be read as safetensors.*copy it again")


class Run:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_code_in_a_file_is_not_run(tmp_path, weights, how):
    path, trap = tmp_path / "w.pt", tmp_path / "ran"
    content = {"generator": weights, "extra": Run(trap)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"extra": Run(trap)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    fails(path, r"holds code \(\w+\.mkdir\).*not run.*tensors alone")
    assert not trap.exists()
    torch.load(path, weights_only=False) if how == "zip" else None
    assert trap.exists() == (how == "zip")  # the trap is real


def test_paths_that_hold_no_weights(tmp_path, weights):
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path / "w.pt", r"No file or folder .*w\.pt.*notes\.txt")
    fails(tmp_path / "none" / "w.pt", "nothing, or is not there")
    fails(tmp_path / "notes.txt", r"no file of a known kind.*\.safetensors")
    fails(tmp_path, r"holds no safetensors, but notes\.txt")
    pointer = tmp_path / "w.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails(pointer, "Git LFS pointer.*git lfs pull")


def test_folders_with_gaps_and_with_too_much(tmp_path, weights):
    folder = tmp_path / "m"
    write_shards(folder, weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    fails(folder, r"several sets of weights: model\.safetensors\.index\.json, diffusion_pytorch")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    moved = (folder / "model-1.safetensors").rename(tmp_path / "elsewhere.safetensors")
    fails(folder, r"names 3 shards, and 1 are not there: model-1\.safetensors")
    first, *_ = part = load_file(moved)
    del part[first]
    save_file(part, folder / "model-1.safetensors")
    fails(folder, f"other tensors than it says: {first}")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1", "../elsewhere"))
    fails(folder, "no index of shards.*another folder")
    index.write_text("{")
    fails(folder, "no index of shards")


FOREIGN = {
    "a VAE": {"encoder.conv1.weight", "decoder.conv1.weight", "conv1.weight"},
    "a text encoder": {"shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"},
    "a LoRA": {"base_model.model.blocks.0.self_attn.q.lora_A.weight"},
    "the weights of an embedded model": {"network.head.head.bias", "codec.mean", "encoder.states"},
    "a part of a Wan transformer": {"blocks.7.self_attn.q.weight"},
    "something unknown": {"layer1.0.conv1.weight"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_weights_is_named(tmp_path, kind):
    path = tmp_path / "w.safetensors"
    save_file({name: torch.zeros(2) for name in FOREIGN[kind]}, path)
    fails(path, f"looks like {kind}.*{unwrap(min(FOREIGN[kind]))}")


def test_other_torch_files_are_named(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, path)
    fails(path, "looks like an optimizer state: state, param_groups")
    torch.save({"generator_lora": {"a.lora_A.weight": torch.zeros(2, 2)}}, path)
    fails(path, "looks like a LoRA.*generator_lora")
    torch.save([torch.zeros(2)], path)
    fails(path, "no table of tensors")


def test_weights_that_are_missing_doubled_foreign_or_quantised(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in weights.items() if "norm_q" not in k}, path)
    fails(path, r"65 of the 69 weights of a Wan with 2 layers.*blocks\.0\.self_attn\.norm_q")
    save_file({**weights, "model.head.modulation": weights["head.modulation"] + 1}, path)
    fails(path, r"both of which are 'head\.modulation'")
    save_file({**weights, "blocks.0.norm4.weight": torch.zeros(2)}, path)
    fails(path, r"Did you mean 'blocks\.0\.norm3\.weight'")
    save_file({**weights, "blocks.0.cross_attn.k_img.bias": torch.zeros(2)}, path)
    fails(path, "text-to-video")
    name = "blocks.0.ffn.0.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, path)
    fails(path, rf"{name}.*float8_e4m3fn, which is quantised")


BEFORE = ["generator.", "diffusion_model.", "net.generator.model.", "model.diffusion_model."]


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", [*BEFORE, "module.ema._orig_mod."])
def test_one_prefix_is_found_by_itself(tmp_path, weights, prefix, naming):
    rename = str if naming == "original" else to_diffusers
    held = {f"{prefix}{rename(name)}": weight for name, weight in weights.items()}
    save_file(held, tmp_path / "w.safetensors")
    found = read_checkpoint(tmp_path / "w.safetensors")
    assert same(found.tensors, weights) and (found.format, found.key) == (naming, None)
    torch.save({"epoch": 3, "state_dict": held}, tmp_path / "w.ckpt")
    found = read_checkpoint(tmp_path / "w.ckpt")
    assert same(found.tensors, weights) and found.key == "state_dict"


@pytest.mark.parametrize("container", ["w.ckpt", "w.safetensors"])
def test_of_several_prefixes_one_is_chosen(tmp_path, weights, container):
    other = {name: weight + 1 for name, weight in weights.items()}
    held = {f"generator.model.{name}": weight for name, weight in weights.items()}
    held |= {f"generator_ema.model.{name}": weight for name, weight in other.items()}
    held["text_encoder.shared.weight"] = torch.zeros(2)
    path = tmp_path / container
    if path.suffix == ".ckpt":
        torch.save({"state_dict": held}, path)
    else:
        save_file(held, path)
    said = r"several prefixes: generator\.model \(69\), generator_ema\.model \(69\).*--key PREFIX"
    fails(path, said)
    for key in ("generator.model", "generator.model.", "generator"):
        found = read_checkpoint(path, key)
        assert same(found.tensors, weights) and found.key == key
    assert same(read_checkpoint(path, "generator_ema").tensors, other)
    fails(path, "has no entry 'critic'", key="critic")


def test_tensors_beside_the_one_prefix_are_said(tmp_path, weights):
    held = {f"generator.model.{name}": weight for name, weight in weights.items()}
    held |= {f"vae.{name}": torch.zeros(2) for name in ("conv1.weight", "conv2.weight")}
    torch.save({"state_dict": held}, tmp_path / "w.ckpt")
    fails(
        tmp_path / "w.ckpt",
        r"69 tensors under generator\.model and 2 others: vae\.conv1\.weight.*"
        r"Choose the former with --key generator\.model",
    )
    assert same(read_checkpoint(tmp_path / "w.ckpt", "generator.model").tensors, weights)
    held = {f"net.{name}": weight for name, weight in weights.items() if "norm_q" not in name}
    save_file(held, tmp_path / "w.safetensors")
    fails(tmp_path / "w.safetensors", "65 of the 69 weights")
    held = {f"net.{name}": weight for name, weight in weights.items()}
    save_file(held | {"net.head.tail.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    fails(tmp_path / "w.safetensors", r"'head\.tail\.weight' is no original name")
    save_file(weights | {"a.head.modulation": torch.zeros(2)}, tmp_path / "w.safetensors")
    fails(tmp_path / "w.safetensors", r"'a\.head\.modulation' is no original name")
    foreign = {"visual.patch_embedding.weight": torch.zeros(2), "visual.x.weight": torch.ones(2)}
    save_file(foreign, tmp_path / "w.safetensors")
    fails(tmp_path / "w.safetensors", "no weights of a Wan transformer")


# -- LoRA ------------------------------------------------------------------------------------


LINEARS = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]


def random_lora(weights, rank=4, name="{}.lora_{}.weight"):
    rng = torch.Generator().manual_seed(5)
    adapter = {}
    for block in range(TINY.layers):
        for linear in LINEARS:
            path = f"blocks.{block}.{linear}"
            out, width = weights[f"{path}.weight"].shape
            adapter[name.format(path, "A")] = torch.randn(rank, width, generator=rng) * 0.1
            adapter[name.format(path, "B")] = torch.randn(out, rank, generator=rng) * 0.1
    return adapter


def through(network, timesteps=None):
    """One bidirectional pass: a chunk that holds all frames."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 4, 6, generator=rng)
    text = torch.randn(2, TINY.text_len, TINY.text_dim, generator=rng)
    if timesteps is None:
        timesteps = torch.tensor([[900.0, 500.0, 0.0]]).expand(2, 3)
    session = CacheSession(TINY.geometry(), preset("full"), range(2))
    step = Pass("commit", (0, 1, 2), (0.0,) * 3, 0, final=(0, 1, 2), opens=True)
    with torch.no_grad():
        return network(x, timesteps, network.prepare(text), session, step), x, text


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize(
    "name", ["base_model.model.{}.lora_{}.weight", "model.{}.lora_{}.default.weight"]
)
@pytest.mark.parametrize("flat", [False, True])
def test_a_merged_lora_computes_what_its_two_matrices_do(tmp_path, weights, name, flat, alpha):
    torch.save({"generator": weights}, tmp_path / "base.pt")
    adapter = random_lora(weights, name=name)
    if alpha is not None:
        adapter |= {
            f"blocks.{b}.{x}.alpha": torch.tensor(alpha)
            for b in range(TINY.layers)
            for x in LINEARS
        }
    torch.save(adapter if flat else {"generator_lora": adapter}, tmp_path / "lora.pt")
    found = read_checkpoint(tmp_path / "base.pt", lora=tmp_path / "lora.pt")
    assert found.lora == "lora.pt"
    assert found.lora_sha256 == hashlib.sha256((tmp_path / "lora.pt").read_bytes()).hexdigest()
    merged = CausalWan(TINY)
    load_into(merged, found)

    hooked = CausalWan(TINY)
    hooked.load_state_dict(weights)
    plain = through(hooked)[0]
    scale = 1.0 if alpha is None else alpha / 4
    for path, linear in hooked.named_modules():
        if path.startswith("blocks") and isinstance(linear, torch.nn.Linear):
            down, up = (adapter[name.format(path, side)] for side in "AB")
            linear.register_forward_hook(
                lambda _, x, out, down=down, up=up: out + scale * (x[0] @ down.T @ up.T)
            )
    expected = through(hooked)[0]
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(through(merged)[0], expected, atol=2e-5, rtol=0)


def test_a_lora_is_added_in_float32_and_rounded_once():
    base = random_weights(dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in base.items()}
    adapter = {k: v.bfloat16() for k, v in random_lora(base, name="{}.lora_{}.weight").items()}
    merged = merge_lora(base, adapter).tensors
    assert same(base, before)
    for key, weight in merged.items():
        path = key.removesuffix(".weight")
        exact = base[key].double()
        if f"{path}.lora_A.weight" in adapter:
            up, down = (adapter[f"{path}.lora_{side}.weight"].double() for side in "BA")
            exact = exact + up @ down
        assert weight.dtype == torch.bfloat16
        assert (weight != exact.bfloat16()).float().mean() < 0.01  # ties of two roundings
    diffusers = {}
    for key, matrix in adapter.items():
        path, side = key.split(".lora")
        diffusers[to_diffusers(f"{path}.bias").replace(".bias", f".lora{side}")] = matrix
    assert same(merge_lora(base, diffusers).tensors, merged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, k: a.pop(k.format("B")), r"only one of A and B for blocks\.1\.ffn\.0"),
        (lambda a, k: a.pop(k.format("A")), r"only one of A and B for blocks\.1\.ffn\.0"),
        (lambda a, k: a.update({k.format("A"): torch.zeros(4, 65)}), r"\[4, 65\].*\[128, 64\]"),
        (lambda a, k: a.update({k.format("A"): torch.zeros(5, 64)}), r"\[5, 64\].*\[128, 64\]"),
        (
            lambda a, k: a.update(
                {k.replace(".1.", ".2.").format(x): a[k.format(x)] + 1 for x in "AB"}
            ),
            r"adapts 'blocks\.2\.ffn\.0', and these weights have 2 layers",
        ),
        (
            lambda a, k: a.update(
                {k.format(x).replace("weight", "b.weight"): a[k.format(x)] + 1 for x in "AB"}
            ),
            "several adapters: None, b",
        ),
        (
            lambda a, k: a.update({"blocks.9.alpha": torch.tensor(1.0)}),
            r"blocks\.9 \(alpha or bias",
        ),
        (lambda a, k: a.update({"blocks.0.dora": torch.zeros(2)}), r"no LoRA.*blocks\.0\.dora"),
        (
            lambda a, k: a.clear() or a.update(random_weights()),
            "no LoRA of plain .*holds whole weights",
        ),
    ],
)
def test_a_lora_that_does_not_belong(tmp_path, weights, change, said):
    adapter = random_lora(weights)
    change(adapter, "blocks.1.ffn.0.lora_{}.weight")
    save_file(weights, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "lora.safetensors")
    fails(tmp_path / "base.safetensors", said, lora=tmp_path / "lora.safetensors")


# -- into a network --------------------------------------------------------------------------


def checkpoint(tmp_path, tensors):
    save_file(tensors, tmp_path / "c.safetensors")
    return read_checkpoint(tmp_path / "c.safetensors")


def test_a_network_without_memory_takes_the_files_dtype(tmp_path, weights):
    half = {k: v.bfloat16() for k, v in weights.items()}
    with torch.device("meta"):
        network = CausalWan(TINY)
    load_into(network, checkpoint(tmp_path, half))
    assert same(network.state_dict(), half)
    own = CausalWan(TINY)
    pointers = [p.data_ptr() for p in own.parameters()]
    load_into(own, checkpoint(tmp_path, half))
    assert same(own.state_dict(), {k: v.float() for k, v in half.items()})
    assert [p.data_ptr() for p in own.parameters()] == pointers


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_of_another_size_is_refused(tmp_path, weights, device):
    wide = WanConfig(dim=64, ffn_dim=96, layers=3, heads=2, text_dim=32)
    with torch.device(device):
        network = CausalWan(wide)
    found = checkpoint(tmp_path, weights)
    with pytest.raises(ValueError) as error:
        load_into(network, found)
    said = str(error.value)
    assert "27 missing (blocks.2.modulation" in said and "and 21 more" in said
    assert "6 of another shape" in said
    assert "blocks.0.ffn.0.weight [128, 64] for [96, 64]" in said
    assert "weights have dim 64, 2 layers, ffn 128" in said
    assert "network has dim 64, 3 layers, ffn 96" in said
    with torch.device("meta"):
        short = CausalWan(WanConfig(dim=64, ffn_dim=128, layers=1, heads=2, text_dim=32))
    with pytest.raises(ValueError, match=r"27 unexpected \(blocks\.1\."):
        load_into(short, found)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b"])
def test_sizes_are_read_off_the_shapes(name):
    network = build_model(name, "meta")
    sizes = infer_sizes(network.state_dict())
    assert {k: getattr(network.config, k) for k in sizes} == sizes
    assert looks_like(network.state_dict()).endswith(f"heads of 128: the size of {name}")
    assert len(sizes) == 8


def test_sizes_of_a_small_and_of_no_network(weights):
    assert infer_sizes(weights)["heads"] is None
    assert {**infer_sizes(weights), "heads": 2}.items() <= TINY.to_dict().items()
    assert looks_like(weights) == "dim 64, 2 layers, ffn 128"
    with pytest.raises(ValueError, match=r"patch_embedding.weight.*a VAE"):
        infer_sizes({"decoder.conv1.weight": torch.zeros(1)})
    assert looks_like({"decoder.conv1.weight": torch.zeros(1)}).startswith("a VAE")


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_forward_pass_equals_diffusers(tmp_path, per_frame):
    torch.manual_seed(3)
    other = theirs(TINY)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn_like(weight) * (weight.ndim == 1))  # norms are not 1
    other.save_pretrained(tmp_path)
    with torch.device("meta"):
        network = CausalWan(TINY)
    load_into(network, read_checkpoint(tmp_path))
    frames = [900.0, 412.5, 30.0] if per_frame else [625.0] * 3
    timesteps = torch.tensor([frames, frames[::-1]])
    ours, x, text = through(network, timesteps)
    given_as = timesteps.repeat_interleave(2 * 3, 1) if per_frame else timesteps[:, 0]
    with torch.no_grad():
        expected = other(x.transpose(1, 2), given_as, text, return_dict=False)[0].transpose(1, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# -- writing ---------------------------------------------------------------------------------


def test_diffusers_loads_what_is_written(tmp_path, weights, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    # Parts that stay in float32 make from_pretrained ask for the package accelerate.
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    save_checkpoint(weights, tmp_path / "d", "diffusers", {"source": "x"}, heads=2)
    loaded, info = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "d", low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(info.values())
    assert same(loaded.state_dict(), {to_diffusers(k): v for k, v in weights.items()})
    assert (loaded.config.num_attention_heads, loaded.config.attention_head_dim) == (2, 32)
    own = {k: v for k, v in theirs(TINY).config.items() if k[0] != "_"}
    assert {k: loaded.config[k] for k in own} == {**own, "patch_size": [1, 2, 2]}


def test_original_names_begin_as_the_published_ones(tmp_path, weights):
    path = tmp_path / "deep" / "o.safetensors"
    save_checkpoint(weights, path, "original")
    assert same(load_file(path), {f"model.{k}": v for k, v in weights.items()})
    assert [p.name for p in path.parent.iterdir()] == ["o.safetensors"]


def test_views_of_one_storage_and_turned_tensors_are_written(tmp_path, weights):
    flat = torch.cat([v.flatten() for v in weights.values()])
    parts = flat.split([v.numel() for v in weights.values()])
    views = {k: p.view(v.shape) for (k, v), p in zip(weights.items(), parts, strict=True)}
    key = "blocks.0.self_attn.q.weight"
    views[key] = views[key].T.contiguous().T
    views["blocks.0.self_attn.q.bias"] = views["blocks.0.self_attn.k.bias"]
    save_checkpoint(views, tmp_path / "o.safetensors", "original")
    assert same(read_checkpoint(tmp_path / "o.safetensors").tensors, views)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_an_error_leaves_what_was_there(tmp_path, weights, naming, monkeypatch):
    out = tmp_path / ("o.safetensors" if naming == "original" else "d")
    save_checkpoint(weights, out, naming, heads=2)
    before = read_checkpoint(out).sha256

    def cut(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", cut)
        for target in (out, tmp_path / f"new{out.suffix}"):
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(weights, target, naming, heads=2)
    assert list(tmp_path.iterdir()) == [out]
    assert read_checkpoint(out).sha256 == before
    save_checkpoint({k: v + 1 for k, v in weights.items()}, out, naming, heads=2)
    assert same(read_checkpoint(out).tensors, {k: v + 1 for k, v in weights.items()})
    assert list(tmp_path.iterdir()) == [out]


def test_places_and_weights_that_cannot_be_written(tmp_path, weights):
    def refused(said, path, naming, tensors=weights, heads=2):
        with pytest.raises(ValueError, match=said):
            save_checkpoint(tensors, tmp_path / path, naming, heads=heads)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    refused("ends in .safetensors", "w.pt", "original")
    refused("ends in .safetensors", "mine", "original")
    refused("Give a folder name", "w.safetensors", "diffusers")
    refused("Give a folder name", "file", "diffusers")
    refused(r"other files: thesis\.txt", "mine", "diffusers")
    refused("Known: original, diffusers", "x", "comfy")
    refused("64 wide and the number of heads is unknown", "d", "diffusers", heads=None)
    refused("64 wide and the number of heads is 3", "d", "diffusers", heads=3)
    part = {k: v for k, v in weights.items() if k != "head.modulation"}
    refused("68 of the 69.*head.modulation", "d", "diffusers", part)
    refused("no original name", "d", "diffusers", {**weights, "x": weights["head.modulation"]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
