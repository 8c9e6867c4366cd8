"""Text states of Wan models, against the encoder run on each prompt alone without padding."""

import html
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.models.text import WanText, clean, text_fingerprint

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")

WORDS = ["a", "cat", "dog", "runs", "sits", "on", "the", "mat", "in", "rain", "and", "café"]
PROMPTS = ["a cat sits on the mat", "", "dog", "the zebra & a  cat\nin rain"]


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    vocab += [(f"▁{word}", -2.0) for word in WORDS]
    vocab += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz&"]
    made = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_encoder(folder, seed=0):
    torch.manual_seed(seed)
    config = transformers.UMT5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    transformers.UMT5EncoderModel(config).eval().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    save_tokenizer(root / "tokenizer")
    save_encoder(root / "text_encoder")
    return root


@pytest.fixture(scope="module")
def text(folder):
    return WanText.load(folder, "cpu", torch.float32)


def alone(folder, prompt):
    """States of one cleaned prompt [n, dim], without padding and without our code."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0, -1] == 1
    with torch.no_grad():
        return encoder.eval()(ids).last_hidden_state[0]


def test_states_are_those_of_the_prompt_alone_then_zeros(folder, text):
    found = text(PROMPTS)
    assert found.shape == (4, 512, 16) and not found.requires_grad
    for row, prompt in zip(found, [*PROMPTS[:3], "the zebra & a cat in rain"], strict=True):
        expected = alone(folder, prompt)
        assert (row[: len(expected)] - expected).abs().max() <= 1e-5
        assert row[: len(expected)].abs().sum(-1).min() > 0.1
        assert not row[len(expected) :].any()
    assert found[1, 0].any() and not found[1, 1:].any()  # the empty prompt is its end token


def test_a_batch_is_one_by_one(text):
    apart = torch.cat([text([prompt]) for prompt in PROMPTS])
    assert (text(PROMPTS) - apart).abs().max() <= 1e-6


def test_states_at_their_true_length(text):
    full = text(PROMPTS)
    for row, states in zip(full, text.states(PROMPTS), strict=True):
        assert torch.equal(row[: len(states)], states)
        assert states[-1].any() and not row[len(states) :].any()


def test_a_prompt_that_is_cut_is_warned_about(folder, text):
    words = ["cat", "dog"] * 300
    with pytest.warns(UserWarning, match=r"601 tokens is cut to 512.*'cat dog cat"):
        found = text(["a dog", " ".join(words)])
    expected = alone(folder, " ".join(words[:511]))  # and the end token
    assert (found[1] - expected).abs().max() <= 1e-5


@pytest.mark.filterwarnings("error")
def test_a_prompt_that_just_fits_is_not(text):
    assert text([" ".join(["cat"] * 511)]).shape == (1, 512, 16)


def test_another_length(text):
    short = WanText(text.tokenizer, text.encoder, length=12)
    assert (short(PROMPTS[:1]) - text(PROMPTS[:1])[:, :12]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"no fingerprint.*Use WanText.load"):
        _ = short.fingerprint


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  a\tcat \n\n sits ", "a cat sits"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&lt;b&gt; &quot;x&quot;", '<b> "x"'),
        ("<b> cats &amp;amp; dogs", "<b> cats & dogs"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("a&nbsp;cat", "a cat"),
        ("", ""),
    ],
)
def test_cleaning(raw, expected):
    assert clean(raw) == expected


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab &;<>\n\t'.", max_size=30))
def test_cleaning_undoes_markup_and_blanks(plain):
    plain = " ".join(html.unescape(html.unescape(plain)).split())
    marked = "  ".join(html.escape(html.escape(word)) for word in plain.split(" "))
    assert clean(f"\n{marked}\t") == plain


def test_the_library_cleans_alike():
    pipeline = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    for raw in (
        "a&amp;amp;b",
        " x  y ",
        "schÃ¶n &lt;",
        "\uff26\uff55ll\u3000width",
        "tab\u200b\tzero",
    ):
        assert clean(raw) == pipeline.prompt_clean(raw)


def test_half_precision_is_the_default(folder):
    text = WanText.load(folder, "cpu")
    assert {p.dtype for p in text.parameters()} == {torch.bfloat16}
    assert text(["a cat"]).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in text.parameters()) and not text.encoder.training


@pytest.fixture
def copied(tmp_path, folder):
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_fingerprint_is_of_the_content(folder, copied, text):
    found = text_fingerprint(folder, torch.float32)
    assert len(found) == 64 and text.fingerprint == found == text_fingerprint(copied, torch.float32)
    assert found != text_fingerprint(folder)
    for file in ("tokenizer/tokenizer.json", "text_encoder/config.json"):
        before = (copied / file).read_bytes()
        (copied / file).write_bytes(before + b"\n")
        assert text_fingerprint(copied, torch.float32) != found
        (copied / file).write_bytes(before)
    assert text_fingerprint(copied, torch.float32) == found
    save_encoder(copied / "text_encoder", seed=1)  # other weights of the same shapes
    assert text_fingerprint(copied, torch.float32) != found


@pytest.mark.parametrize("gone", ["tokenizer", "text_encoder/config.json", "text_encoder/*.safet*"])
def test_what_a_folder_lacks_is_said(copied, gone):
    for path in copied.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=rf"lacks {gone[:20].replace('*', '.')}.*diffusers format"):
        WanText.load(copied, "cpu")


def test_damaged_weights_are_refused(copied):
    from safetensors.torch import load_file, save_file

    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors, such as encoder.final_layer_norm"):
        WanText.load(copied, "cpu")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be loaded.*Copy its"):
        WanText.load(copied, "cpu")


@pytest.mark.parametrize("module", ["ftfy", "transformers"])
def test_a_missing_package_is_said(folder, text, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'{module}.*pip install "lightning_kv\[wan\]"'):
        text(["a cat"]) if module == "ftfy" else WanText.load(folder, "cpu")
