"""Sources: everything that can be written for a model, and what is refused before it is read."""

import gc
import hashlib
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_kv.models import loading
from lightning_kv.models.catalogue import CATALOGUE
from lightning_kv.models.embedded import WEIGHTS, save_embedded
from lightning_kv.models.embeddings import write_embeddings
from lightning_kv.models.loading import load_model
from lightning_kv.models.sizes import PRESETS, parameters
from lightning_kv.models.sources import find_model
from lightning_kv.models.text import WanText
from lightning_kv.models.vae import WanVAE
from lightning_kv.models.wan import CausalWan, WanConfig

SIZES = {"dim": 64, "ffn_dim": 128, "layers": 2, "heads": 2, "text_dim": 16, "latent_size": (8, 12)}
STEP = 2**-6  # of bfloat16 between 2 and 4, where the largest states are: batches may round apart


@pytest.fixture(autouse=True)
def models(monkeypatch, tmp_path):
    """An empty folder of models, no hub cache, and a home."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "models"


def put(path, content=b"{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_parts(models):
    """The files that say that text encoder, tokenizer and VAE are there."""
    parts = models / "wan2.1-parts"
    for name in ("text_encoder", "vae"):
        put(parts / name / "config.json")
        put(parts / name / "model.safetensors")
    put(parts / "tokenizer" / "tokenizer_config.json")
    put(parts / "tokenizer" / "tokenizer.json")
    return parts


def put_yaml(path, **values):
    put(path, yaml.safe_dump(values).encode())
    return str(path)


def refused(text, *words, find=find_model):
    with pytest.raises(ValueError) as error:
        find(text)
    said = str(error.value)
    assert all(word in said for word in words), said


# -- where the weights are -------------------------------------------------------------------


def test_the_embedded_model_by_name_and_by_file(tmp_path, panorama):
    found = find_model("panorama")
    assert (found.name, found.weights) == ("panorama", WEIGHTS / "panorama.safetensors")
    assert found.config is found.lora is found.text is found.vae is None
    assert found.policy == "full"
    path = tmp_path / "mine.safetensors"
    save_embedded(path, panorama, {})
    assert (find_model(str(path)).weights, find_model(str(path)).config) == (path, None)
    torn = put(tmp_path / "torn.safetensors", path.read_bytes()[:1000])
    assert find_model(str(torn)).config is None  # whoever reads it says what is wrong
    refused(str(torn), "(1000 bytes) cannot be read as safetensors", find=load_model)
    refused(str(tmp_path / "no.safetensors"), "No weights file", find=load_model)


def test_a_published_name_is_found_in_the_folder_of_models(models):
    for name, policy in (("self-forcing", "full"), ("longlive", "longlive"), ("krea-14b", None)):
        entry = CATALOGUE[name]
        refused(
            name,
            f"The weights of {name!r} are not here",
            str(models / name),
            f"lightning-kv fetch {name}",
            f"{name}=FILE",
        )
        files = [put(models / name / file) for file in entry.files]
        found = find_model(name)
        assert (found.name, found.weights, found.config) == (name, files[0], entry.config)
        assert (found.key, found.lora) == (entry.key, files[1] if len(files) > 1 else None)
        assert found.policy == (policy or entry.policy)
        assert found.text is found.vae is None
    parts = put_parts(models)
    found = find_model("longlive")
    assert (found.text, found.vae) == (parts, parts / "vae")
    (parts / "vae" / "model.safetensors").unlink()  # half a download is none
    assert find_model("longlive").text is None


def test_half_of_a_download_is_not_here(models):
    base = put(models / "longlive" / CATALOGUE["longlive"].files[0])
    refused("longlive", "The weights of 'longlive' are not here")
    put(models / "longlive" / CATALOGUE["longlive"].files[1])
    assert find_model("longlive").weights == base


def test_a_name_with_ones_own_copy(models, tmp_path):
    put(models / "longlive" / CATALOGUE["longlive"].files[0])
    put(models / "longlive" / CATALOGUE["longlive"].files[1])
    found = find_model("longlive=a/base.pt+b/lora.pt")
    assert (found.weights, found.lora) == (Path("a/base.pt"), Path("b/lora.pt"))
    assert found.name == "longlive=a/base.pt+b/lora.pt"
    assert (found.config, found.policy) == (CATALOGUE["longlive"].config, "longlive")
    found = find_model("self-forcing=x.pt")
    assert (found.weights, found.lora, found.key) == (Path("x.pt"), None, None)
    assert found.prefer == "generator_ema"  # but a file of one's own may be flat
    assert find_model("self-forcing=x.pt+l.pt").lora == Path("l.pt")
    # the LoRA that lies in the folder of models is not put on other weights in silence
    refused("longlive=a/base.pt", "gives one file", "longlive=WEIGHTS+LORA", "models/lora.pt")


def test_a_size_with_a_file(models):
    found = find_model("wan-14b=w.safetensors")
    assert (found.weights, found.config) == (Path("w.safetensors"), PRESETS["wan-14b"])
    assert (found.key, found.lora, found.policy) == (None, None, "full")
    assert find_model("wan-1.3b=w.pt+l.pt").lora == Path("l.pt")
    refused("wan-1.3b", "is a size, without weights", "wan-1.3b=FILE", "self-forcing")


def test_a_published_file_by_its_own_name(tmp_path):
    for file, name in (
        ("self_forcing_sid.pt", "self-forcing-sid"),
        ("deep/framewise/causal_forcing.pt", "causal-forcing-frame"),
        ("krea-realtime-video-14b.safetensors", "krea-14b"),
    ):
        path = put(tmp_path / file)
        found = find_model(str(path))
        assert (found.name, found.weights) == (str(path), path)
        assert (found.config, found.prefer) == (CATALOGUE[name].config, CATALOGUE[name].key)
    path = put(tmp_path / "longlive_base.pt")
    refused(str(path), "made of weights and a LoRA", str(path), "longlive=WEIGHTS+LORA")
    refused(str(tmp_path / "self_forcing_dmd.pt"), "No model")  # it is not there


def test_paths_in_a_model_file_are_relative_to_it(tmp_path, monkeypatch):
    text = put_yaml(
        tmp_path / "deep" / "m.yaml",
        name="mine",
        like="longlive",
        weights="../w.pt",
        lora=str(tmp_path / "l.pt"),
        key="generator",
        text="~/parts",
        vae="vae",
        config={"chunk": 1, "latent_size": [8, 12], "timesteps": [1000.0, 500.0]},
    )
    monkeypatch.chdir(tmp_path)
    for given in (text, "deep/m.yaml"):
        found = find_model(given)
        assert found.name == "mine" and found.key == "generator"
        assert found.weights.resolve() == tmp_path / "w.pt"
        assert found.lora == tmp_path / "l.pt"
        assert found.text == tmp_path / "home" / "parts"
        assert found.vae.resolve() == tmp_path / "deep" / "vae"
        changes = {"chunk": 1, "latent_size": (8, 12), "timesteps": (1000.0, 500.0)}
        assert found.config == replace(CATALOGUE["longlive"].config, **changes)
        assert found.policy == "longlive"


def test_a_model_file_that_says_no_more_than_it_must(models, tmp_path):
    short = {"name": "m", "like": "wan-1.3b", "weights": "~/w.pt"}
    text = put_yaml(tmp_path / "m.yml", **short)
    found = find_model(text)
    assert (found.weights, found.policy) == (tmp_path / "home" / "w.pt", "full")
    assert found.config == PRESETS["wan-1.3b"]
    assert found.key is found.lora is found.text is found.vae is None
    parts = put_parts(models)
    assert (find_model(text).text, find_model(text).vae) == (parts, parts / "vae")
    again = put_yaml(tmp_path / "n.yaml", **short, text="t", vae="v")  # its own come first
    assert find_model(again).text == tmp_path / "t" and find_model(again).vae == tmp_path / "v"


def test_unknown_names_and_files(tmp_path):
    refused("self-forcin", "No model 'self-forcin'", "Did you mean 'self-forcing'?", "YAML file")
    refused("panoramma", "Did you mean 'panorama'?")
    refused("xyz", "No model 'xyz'. Known: panorama, self-forcing")
    refused("longlife=w.pt", "No published checkpoint 'longlife'", "Did you mean 'longlive'?")
    refused("q=w.pt", "Known: self-forcing", "Or a size: wan-1.3b, wan-14b")
    for name in ("causal_forcing.pt", "other.safetensors"):
        path = tmp_path / name
        save_file({"a": torch.zeros(1)}, path)
        refused(str(path), "does not say how it is sampled", f"self-forcing={path}")
    refused(str(tmp_path), "does not say how it is sampled")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: a\n\tx", ["is no YAML", "`name:`, `like:` and `weights:`"]),
        ("- a\n- b", ["is no model file", "`name:`, `like:` and `weights:`"]),
        ("", ["is no model file"]),
        ("name: a\nlike: longlive", ["is no model file"]),
        ("{name: a, like: long, weights: w}", ["`like` is wrong", "Did you mean 'longlive'?"]),
        ("{name: a, like: wan-1.3, weights: w}", ["Did you mean 'wan-1.3b'?"]),
        ("{name: a, like: longlive, weights: w, loras: x}", ["'loras'", "Did you mean 'lora'?"]),
        (
            "{name: a, like: causvid, weights: w, config: {layer: 2}}",
            ["In the config of", "No setting 'layer'", "Did you mean 'layers'?"],
        ),
    ],
)
def test_a_model_file_that_is_wrong_is_said(tmp_path, content, words):
    path = put(tmp_path / "m.yaml", content.encode())
    refused(str(path), str(path), *words)


def test_a_model_file_that_is_not_there_is_said(tmp_path):
    refused(str(tmp_path / "m.yaml"), "No model file", "m.yaml", "Give a YAML file")


# -- from the source to a model --------------------------------------------------------------


def read(folder, key="generator_ema"):
    """Weights of the tiny Wan, without the names of training."""
    found = torch.load(folder / "generator.pt", weights_only=True)[key]
    return {
        name.replace("_fsdp_wrapped_module.", "").removeprefix("model."): tensor
        for name, tensor in found.items()
    }


def model_file(folder, tmp_path, **changes):
    """A model file for the tiny Wan with other values; None takes one away."""
    values = yaml.safe_load((folder / "model.yaml").read_text())
    values |= {name: str(folder / values[name]) for name in ("weights", "text", "vae")} | changes
    return put_yaml(tmp_path / "m.yaml", **{k: v for k, v in values.items() if v is not None})


def states(prompts):
    """Text states that need no text encoder."""
    return torch.zeros(len(prompts), 512, 16)


@pytest.fixture
def spied(monkeypatch):
    """What was read, in order: weights, text encoder, VAE."""
    seen = []

    def spy(owner, name, what, wrap=lambda made: made):
        real = getattr(owner, name)

        def called(*args, **more):
            seen.append(what)
            return real(*args, **more)

        monkeypatch.setattr(owner, name, wrap(called))

    spy(loading, "read_checkpoint", "weights")
    spy(WanText, "load", "text", staticmethod)
    spy(WanVAE, "load", "vae", staticmethod)
    return seen


def test_a_published_name_becomes_a_model(tiny_wan, models, monkeypatch):
    """By its name alone, from the folder of models, with the key and precision of its authors."""
    tiny = replace(CATALOGUE["causal-forcing"], changes=SIZES)
    monkeypatch.setitem(CATALOGUE, tiny.name, tiny)
    (models / tiny.name / "chunkwise").mkdir(parents=True)
    shutil.copy(tiny_wan / "generator.pt", models / tiny.name / tiny.files[0])
    shutil.copytree(tiny_wan, models / "wan2.1-parts", ignore=lambda *_: ["generator.pt"])
    model = load_model(tiny.name)
    assert {w.dtype for w in model.network.parameters()} == {torch.bfloat16}
    assert next(model.codec.parameters()).dtype == torch.bfloat16
    expected = read(tiny_wan, "generator")
    ours = model.network.state_dict()
    assert all(torch.equal(ours[k], expected[k].bfloat16()) for k in expected)
    assert not model.network.training and not any(
        w.requires_grad for w in model.network.parameters()
    )
    digest = hashlib.sha256((tiny_wan / "generator.pt").read_bytes()).hexdigest()
    vae = next((tiny_wan / "vae").glob("*.safetensors")).read_bytes()
    text = model.source.pop("text")
    assert len(text) == 64 and text == WanText.load(tiny_wan, "cpu").fingerprint
    assert model.source == {
        "weights": digest,
        "key": "generator",
        "format": "original",
        "precision": "reference",
        "vae": hashlib.sha256(vae).hexdigest(),
    }


def test_precision_where_none_is_given(tiny_wan, tmp_path):
    given = {"text": states, "decode": False}
    path = model_file(tiny_wan, tmp_path)
    for precision, name, dtype in (
        (None, "reference", torch.bfloat16),
        ("fast", "fast", torch.bfloat16),
        ("float32", "float32", torch.float32),
    ):
        model = load_model(path, precision=precision, **given)
        assert model.source["precision"] == name
        assert {w.dtype for w in model.network.parameters()} == {dtype}
    for precision, name in ((None, "float32"), ("reference", "reference")):
        model = load_model("panorama", precision=precision)
        digest = hashlib.sha256((WEIGHTS / "panorama.safetensors").read_bytes()).hexdigest()
        assert model.source == {"weights": digest, "precision": name}
    refused("panorama", "No precision profile", find=lambda n: load_model(n, precision="fp8"))


def test_without_pixels_no_vae_is_asked_for(tiny_wan, tmp_path, spied):
    path = model_file(tiny_wan, tmp_path, vae=None)
    model = load_model(path, text=states, decode=False)
    assert model.codec is None and "vae" not in model.source and spied == ["weights"]
    refused(
        path,
        "Pixels need a VAE",
        "lightning-kv fetch wan2.1-parts",
        "--vae FOLDER",
        find=lambda name: load_model(name, text=states),
    )
    assert spied == ["weights"]


def test_an_encoder_of_ones_own(tiny_wan, tmp_path, spied):
    given = load_model(model_file(tiny_wan, tmp_path), text=states, decode=False, prompts=["a"])
    assert given.encoder is states and "text" not in given.source and spied == ["weights"]

    class Signed:
        fingerprint = "f" * 64
        __call__ = staticmethod(states)

    signed = load_model(model_file(tiny_wan, tmp_path), text=Signed(), decode=False)
    assert signed.source == given.source | {"text": "f" * 64}


def test_the_text_encoder_is_let_go_when_all_prompts_are_known(tiny_wan, tmp_path, monkeypatch):
    whole = WanText.load(tiny_wan, "cpu")
    made, real = [], WanText.load

    def load(*args):
        encoder = real(*args)
        made.append(weakref.ref(encoder.encoder))
        return encoder

    monkeypatch.setattr(WanText, "load", load)
    path = model_file(tiny_wan, tmp_path)
    prompts = ["a fox", "", "a boat", "a fox"]
    model = load_model(path, decode=False, prompts=prompts)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    for batch in (["a boat"], ["", "a fox", "a fox"], prompts):
        expected = torch.cat([whole([prompt]) for prompt in batch])
        assert (model.encoder(batch) - expected).abs().max() <= STEP
    assert (whole(["a fox"]) - whole(["a boat"])).abs().max() > 1
    assert model.source["text"] == whole.fingerprint
    with pytest.raises(ValueError, match=r"let go before it met 'a cat'.*load_model\(prompts="):
        model.encoder(["a fox", "a cat"])
    kept = load_model(path, decode=False)
    gc.collect()
    assert made[1]() is not None and kept.encoder(["a cat"]).shape == (1, 512, 16)


def test_a_lora_is_merged_into_the_weights(tiny_wan, tmp_path):
    base, lora = read(tiny_wan), {}
    for module in ("blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.1.cross_attn.o"):
        out, inside = base[f"{module}.weight"].shape
        lora[f"{module}.lora_A.default.weight"] = torch.randn(4, inside)
        lora[f"{module}.lora_B.default.weight"] = torch.randn(out, 4)
    file = tmp_path / "lora.pt"
    torch.save({"generator_lora": {f"base_model.model.{k}": v for k, v in lora.items()}}, file)
    given = {"text": states, "decode": False, "precision": "float32"}
    plain = load_model(model_file(tiny_wan, tmp_path), **given)
    with pytest.warns(UserWarning, match="lora.pt does not say how strong its products are"):
        merged = load_model(model_file(tiny_wan, tmp_path, lora=str(file)), **given)
    before, after = plain.network.state_dict(), merged.network.state_dict()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in lora:
            down, up = (lora[f"{module}.lora_{side}.default.weight"].double() for side in "AB")
            assert torch.allclose(after[name].double(), weight.double() + up @ down, atol=1e-5)
            assert not torch.allclose(after[name], weight, atol=1e-1)
        else:
            assert torch.equal(after[name], weight), name
    more = {"lora": "lora.pt", "lora_weights": hashlib.sha256(file.read_bytes()).hexdigest()}
    more |= {"lora_strength": "1", "lora_strength_by": "alpha = rank, unsaid"}
    assert merged.source == plain.source | more


@pytest.mark.filterwarnings("error")
def test_a_lora_is_as_strong_as_its_writer_says_however_it_is_given(
    tiny_wan, tmp_path, monkeypatch
):
    base, folder = read(tiny_wan), tmp_path / "peft"
    folder.mkdir()
    pair = {
        f"blocks.0.ffn.2.lora_{x}.weight": torch.randn(s)
        for x, s in (("A", (4, 128)), ("B", (64, 4)))
    }
    save_file(
        {f"base_model.model.{k}": v for k, v in pair.items()}, folder / "adapter_model.safetensors"
    )
    monkeypatch.setitem(PRESETS, "wan-tiny", WanConfig(**SIZES))
    given = {"text": states, "decode": False, "precision": "float32"}
    weights = tiny_wan / "generator.pt"
    known = []
    for alpha in (8, 2):
        text = f'{{"r": 4, "lora_alpha": {alpha}}}'
        put(folder / "adapter_config.json", text.encode())
        digest = hashlib.sha256(text.encode()).hexdigest()
        for lora in (folder, folder / "adapter_model.safetensors"):
            for name in (
                f"wan-tiny={weights}+{lora}",
                model_file(tiny_wan, tmp_path, lora=str(lora)),
            ):
                model = load_model(name, **given)
                found = model.network.state_dict()["blocks.0.ffn.2.weight"]
                down, up = (pair[f"blocks.0.ffn.2.lora_{x}.weight"].double() for x in "AB")
                expected = base["blocks.0.ffn.2.weight"].double() + alpha / 4 * up @ down
                torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
                assert model.source["lora_strength"] == str(alpha / 4).removesuffix(".0")
                assert model.source["lora_strength_by"] == "adapter_config.json"
                assert model.source["lora_config"] == digest
                assert model.source["lora"] == lora.name
        known.append(model.source)
    differ = {key for key in known[0] if known[0][key] != known[1][key]}
    assert differ == {"lora_strength", "lora_config"}


# -- what is refused, and when ---------------------------------------------------------------


def test_too_little_memory_is_said_before_anything_is_read(tiny_wan, tmp_path, spied, monkeypatch):
    path = model_file(tiny_wan, tmp_path)
    weights = sum(weight.numel() for weight in read(tiny_wan).values())
    assert parameters(WanConfig(**SIZES)) == weights
    for precision, size in (("float32", 4), ("reference", 2), (None, 2)):
        needed = weights * size * loading.ROOM
        monkeypatch.setattr(loading, "memory_of", lambda device, there=needed: int(there) - 1)
        with pytest.raises(ValueError, match=r"weights alone take \d+ KiB in .*cpu has \d+ KiB"):
            load_model(path, precision=precision)
        assert spied == []
        monkeypatch.setattr(loading, "memory_of", lambda device, there=needed: int(there) + 1)
        assert load_model(path, precision=precision, text=states, decode=False).network
        spied.clear()


def test_the_memory_that_is_counted_is_the_devices(monkeypatch):
    there = {"cpu": 30e9, "cuda": 20e9}
    monkeypatch.setattr(loading, "memory_of", lambda device: there[device.type])
    config = PRESETS["wan-14b"]  # 14.3 billion weights
    needed = parameters(config) * 2 * 1.15
    assert 32e9 < needed < 34e9
    with pytest.raises(ValueError, match=r"take 30\.6 GiB in fast, and cuda has 18\.6 GiB.*GPU"):
        loading.check_memory(config, "fast", "cuda")
    small = PRESETS["wan-1.3b"]
    there["cpu"] = parameters(small) * 2 * 1.15
    loading.check_memory(small, "reference", "cpu")
    with pytest.raises(ValueError, match=r"take 6\.08 GiB in float32"):
        loading.check_memory(small, "float32", "cpu")
    there["cpu"] = 1e15
    with pytest.raises(ValueError, match=r"14\.3 billion parameters on a CPU takes hours"):
        loading.check_memory(config, "reference", "cpu")


def small_vae(folder, multipliers):
    """A VAE with so many levels."""
    diffusers = pytest.importorskip("diffusers")
    steps = [False, True, True][-(len(multipliers) - 1) :]
    diffusers.AutoencoderKLWan(
        base_dim=4, num_res_blocks=1, dim_mult=multipliers, temperal_downsample=steps
    ).save_pretrained(folder)
    return folder


def test_a_vae_of_another_stride_is_said_before_the_weights_are_read(tiny_wan, tmp_path, spied):
    folder = small_vae(tmp_path / "vae", [1, 1, 1])
    with pytest.raises(ValueError) as error:
        load_model(model_file(tiny_wan, tmp_path), text=states, vae=folder)
    said = str(error.value)
    assert f"The VAE {folder} makes (4, 4)" in said and "is for (4, 8)" in said
    assert "Give the VAE of Wan2.1" in said and spied == ["vae"]
    other = model_file(
        tiny_wan, tmp_path, config={**SIZES, "latent_size": [8, 12], "stride": [4, 4]}
    )
    assert load_model(other, text=states, vae=folder).codec.stride == (4, 4)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"text": None}, {}, ["neither a text encoder nor embeddings", "--text FOLDER"]),
        ({"text": "nowhere"}, {}, ["no Wan text encoder in", "nowhere"]),
        ({}, {"text": Path("no")}, ["no Wan text encoder in no:", "tokenizer/"]),
        ({"vae": None}, {"text": states}, ["Pixels need a VAE"]),
        ({"vae": "nowhere"}, {"text": states}, ["no Wan VAE in", "nowhere"]),
        ({}, {"text": states, "vae": Path("no")}, ["no Wan VAE in no:"]),
        ({}, {"precision": "fp8"}, ["No precision profile 'fp8'", "float32, reference, fast"]),
        ({"like": "krea-14b", "config": None}, {}, ["GiB in reference", "a smaller model"]),
        ({"weights": "nowhere.pt"}, {"text": states, "decode": False}, ["nowhere.pt"]),
    ],
)
def test_cheap_errors_come_before_anything_large_is_read(
    tiny_wan, tmp_path, spied, monkeypatch, changes, given, words
):
    monkeypatch.setattr(loading, "memory_of", lambda device: 10e9)
    path = model_file(tiny_wan, tmp_path, **changes)
    refused(path, *words, find=lambda name: load_model(name, **given))
    opened = {"weights": "weights", "text": "text", "vae": "vae"}
    assert len(spied) <= 1 and all(opened[what] in str(changes | given) for what in spied)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"weights": "nowhere.pt"}, {}),
        ({"lora": "nowhere.pt"}, {}),
        ({"vae": None}, {}),
        ({"vae": "nowhere"}, {}),
        ({}, {"vae": Path("nowhere")}),
    ],
)
def test_what_is_not_there_is_said_before_the_text_encoder_is_read(
    tiny_wan, tmp_path, monkeypatch, changes, given
):
    def load(*_):
        raise AssertionError("the text encoder was read")

    monkeypatch.setattr(WanText, "load", load)
    with pytest.raises(ValueError):
        load_model(model_file(tiny_wan, tmp_path, **changes), prompts=["a"], **given)


def test_weights_of_another_size_are_said(tiny_wan, tmp_path):
    config = {**SIZES, "latent_size": [8, 12], "layers": 3}
    path = model_file(tiny_wan, tmp_path, config=config)
    refused(
        path,
        "do not fit the network",
        "dim 64, 2 layers",
        "dim 64, 3 layers",
        find=lambda name: load_model(name, text=states, decode=False),
    )
    network = CausalWan(WanConfig(**SIZES))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    path = model_file(tiny_wan, tmp_path, weights=str(tmp_path / "w.safetensors"), key="generator")
    refused(path, "no entry 'generator'", find=lambda n: load_model(n, text=states, decode=False))


def test_embeddings_in_place_of_a_text_encoder(tiny_wan, tmp_path, spied):
    whole = WanText.load(tiny_wan, "cpu")
    known = ["a fox", "", "a boat"]
    spied.clear()
    folder = tmp_path / "book"
    items = zip(known, whole.states(known), strict=True)
    write_embeddings(folder, items, whole.fingerprint, whole.length)
    path = model_file(tiny_wan, tmp_path)
    model = load_model(path, text=folder, decode=False, prompts=["a boat", ""])
    assert (model.encoder(["a boat", ""]) - whole(["a boat", ""])).abs().max() <= STEP
    index = hashlib.sha256((folder / "embeddings.json").read_bytes()).hexdigest()
    assert model.source["text"] == index and spied == ["weights"]  # every state counts
    with pytest.raises(ValueError, match="no text states for 'a cat'"):
        load_model(path, text=folder, decode=False, prompts=["a fox", "a cat"])
    assert spied == ["weights"]  # said before the weights were read


# -- what is not said yet --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{name: a, like: longlive, weights: }", "weights"),
        ("{name: a, like: causvid, weights: w, config: 3}", "config"),
        ("{name: a, like: causvid, weights: w, config: [dim]}", "config"),
        ("{name: a, like: causvid, weights: w, config: {dim: wide}}", "dim"),
    ],
)
def test_a_value_of_another_kind_in_a_model_file_is_said(tmp_path, content, word):
    path = put(tmp_path / "m.yaml", content.encode())
    refused(str(path), word, str(path))


@pytest.mark.parametrize("kind", ["embedded", "published", "empty", "home"])
def test_what_stands_around_an_equals_sign(tmp_path, kind):
    folder = tmp_path / "lr=0.1"
    if kind == "embedded":
        path = folder / "mine.safetensors"
        folder.mkdir()
        shutil.copy(WEIGHTS / "panorama.safetensors", path)
        assert find_model(str(path)).weights == path
    elif kind == "published":
        path = put(folder / "self_forcing_dmd.pt")
        assert find_model(str(path)).weights == path
    elif kind == "empty":
        refused("self-forcing=", "names no file", "Write NAME=FILE")
    else:  # a shell leaves it as it is after a name with a hyphen
        assert find_model("self-forcing=~/w.pt").weights == tmp_path / "home" / "w.pt"


def test_the_embedded_model_takes_no_other_file_by_its_name():
    with pytest.raises(ValueError) as error:
        find_model("panorama=mine.safetensors")
    assert "Write panorama=FILE" not in str(error.value)
