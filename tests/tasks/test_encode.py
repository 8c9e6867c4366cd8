"""Encoding a set of prompts: what is encoded, what is kept, what is said."""

import os
from pathlib import Path

import pytest
import torch

from lightning_kv.data.shards import PromptShards, read_index, write_prompt_shards
from lightning_kv.models.embeddings import PromptBook
from lightning_kv.models.text import WanText
from lightning_kv.tasks.encode import encode

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")

VBENCH = Path(__file__).parents[3] / "shared" / "prompts" / "vbench_all_dimension.txt"
LINES = ["a cat", "", "a dog &amp; a cat", "a  cat", "  a cat ", "\t", "rain"]
TEXTS = ["a cat", "a dog &amp; a cat", "a  cat", "a cat", "rain"]  # without blank lines and ends
DISTINCT = ["a cat", "a dog &amp; a cat", "a  cat", "rain", ""]
STEP = 2**-6  # of bfloat16 between 2 and 4, where the largest states are: batches may round apart


def save_text(folder, seed=0):
    """A tiny tokenizer and encoder as in a Wan repository."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5, "rain": 6}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = transformers.UMT5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_text(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "My prompts.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8-sig")
    return path


@pytest.fixture
def calls(monkeypatch):
    """Batches that the encoder was asked for."""
    seen, states = [], WanText.states

    def counted(self, batch):
        seen.append(list(batch))
        return states(self, batch)

    monkeypatch.setattr(WanText, "states", counted)
    return seen


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_list_becomes_a_set_that_can_be_evaluated(prompts, tmp_path, text, calls):
    out = tmp_path / "out"
    done = encode(prompts, out, text, "cpu", batch=2)
    assert calls == [DISTINCT[:2], DISTINCT[2:4], DISTINCT[4:]]
    samples = list(PromptShards(read_index(out)))
    assert [sample.prompt for sample in samples] == TEXTS
    assert len({sample.key for sample in samples}) == 5  # the repeated one is another world
    book, encoder = PromptBook(out), WanText.load(text, "cpu")
    assert book.prompts == DISTINCT and book.encoder == encoder.fingerprint
    states = encoder(TEXTS)
    assert (book([sample.prompt for sample in samples]) - states).abs().max() <= STEP
    assert (states[1] - states[0]).abs().max() > 1
    assert (done.out, done.added, done.kept) == (out, 5, 0)
    said = "\n".join(done.words)
    assert f"all 5 prompts are in {out}; 5 were encoded now." in said
    assert "5 prompts." in said and "Blank lines left out: 2." in said
    assert "Repeated prompts: 1, kept in the set, encoded once." in said
    assert "The empty prompt is encoded too." in said


def test_a_finished_set_is_left_alone(prompts, tmp_path, text, calls, monkeypatch):
    out = tmp_path / "out"
    encode(prompts, out, text, "cpu")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    calls.clear()
    monkeypatch.setattr(WanText, "load", None)  # 11 GB that need not be read
    done = encode(prompts, out, text, "cpu")
    assert done.words[0].startswith("Nothing to do") and (done.added, done.kept) == (0, 5)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert not calls


def test_a_negative_prompt_is_added_later(prompts, tmp_path, text, calls):
    out = tmp_path / "out"
    encode(prompts, out, text, "cpu")
    calls.clear()
    done = encode(prompts, out, text, "cpu", negative="blurry")
    assert calls == [["blurry"]] and (done.added, done.kept) == (1, 5)
    assert PromptBook(out).prompts == [*DISTINCT, "blurry"]
    assert "The empty prompt is encoded too, and the negative one." in done.words


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "set"
    samples = [(f"k-{i:03d}", {"prompt": f"cat {i % 70}"}) for i in range(140)]
    write_prompt_shards(samples, folder, "set", 60)
    return folder


def test_shards_get_their_states_beside_them(shards, text, calls):
    before = content(shards)
    done = encode(shards, None, text, "cpu")
    assert done.out == shards and done.added == 71 == sum(map(len, calls))
    assert before.items() <= content(shards).items()
    assert "Repeated prompts: 70, kept in the set, encoded once." in done.words
    assert PromptBook(shards).prompts == [*(f"cat {i}" for i in range(70)), ""]


def test_states_of_shards_elsewhere(shards, tmp_path, text):
    before = content(shards)
    encode(shards / "index.json", tmp_path / "else", text, "cpu")
    assert content(shards) == before
    assert sorted(content(tmp_path / "else")) == [
        "embeddings-000000.safetensors",
        "embeddings-000001.safetensors",
        "embeddings.json",
    ]


def test_an_interrupted_run_goes_on(shards, text, calls, monkeypatch):
    counted = WanText.states

    def breaks(self, batch):
        if len(calls) == 8:  # after 64 prompts, one file
            raise KeyboardInterrupt
        return counted(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(WanText, "states", breaks)
        with pytest.raises(KeyboardInterrupt):
            encode(shards, None, text, "cpu")
    assert not (shards / "embeddings.json").exists()
    calls.clear()
    done = encode(shards, None, text, "cpu")
    assert (done.added, done.kept) == (7, 64) and sum(map(len, calls)) == 7
    interrupted = content(shards)
    encode(shards, None, text, "cpu", force=True)
    assert content(shards) == interrupted


def test_another_encoder_needs_force(prompts, tmp_path, text):
    out, other = tmp_path / "out", tmp_path / "other"
    save_text(other, seed=1)
    encode(prompts, out, text, "cpu")
    before = content(out)
    with pytest.raises(ValueError, match=r"another text encoder.*--force"):
        encode(prompts, out, other, "cpu")
    assert content(out) == before
    encode(prompts, out, other, "cpu", force=True)
    book = PromptBook(out)
    assert (book(["rain"]) - WanText.load(other, "cpu")(["rain"])).abs().max() <= STEP
    assert (book(["rain"]) - WanText.load(text, "cpu")(["rain"])).abs().max() > 1


def test_another_list_needs_another_folder(prompts, tmp_path, text):
    out = tmp_path / "out"
    encode(prompts, out, text, "cpu")
    before = content(out)
    prompts.write_text("a cat\n")
    for force in (False, True):
        with pytest.raises(ValueError, match=r"another set of prompts: 5 instead of the 1"):
            encode(prompts, out, text, "cpu", force=force)
    assert content(out) == before


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("missing.txt", None, r"cannot be read: .*UTF-8 text file with one prompt per line"),
        ("missing", None, r"no prompts at .*Give a folder of prompt shards, or a .txt"),
        ("blank.txt", b"\n \n\n", r"holds none: 3 lines, all blank"),
        ("latin.txt", "schön".encode("latin-1"), r"cannot be read: .*UTF-8"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, text, name, raw, said):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        encode(tmp_path / name, tmp_path / "out", text, "cpu")
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(prompts, tmp_path, text):
    with pytest.raises(ValueError, match=r"Give --out, such as --out .*My prompts"):
        encode(prompts, None, text, "cpu")
    with pytest.raises(ValueError, match=r"batch of 0 prompts"):
        encode(prompts, tmp_path / "out", text, "cpu", batch=0)
    with pytest.raises(ValueError, match=r"no Wan text encoder in .*diffusers format"):
        encode(prompts, tmp_path / "out", tmp_path, "cpu")
    assert not (tmp_path / "out").exists()


def test_a_line_ends_with_its_line_alone(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_bytes("a cat\u2028a dog\r\nrain\x0brain".encode())
    done = encode(path, tmp_path / "out", text, "cpu")
    assert PromptBook(done.out).prompts == ["a cat\u2028a dog", "rain\x0brain", ""]


@pytest.mark.skipif(not VBENCH.is_file(), reason="the shared prompt list is not here")
def test_the_vbench_list(tmp_path, text, monkeypatch):
    monkeypatch.setattr(WanText, "states", lambda _, batch: [torch.ones(1, 8) for _ in batch])
    done = encode(VBENCH, tmp_path, text, "cpu", batch=64)
    lines = VBENCH.read_text().split(os.linesep)
    texts = [line.strip() for line in lines if line.strip()]
    assert [sample.prompt for sample in PromptShards(read_index(tmp_path))] == texts
    assert len(texts) == 946 and done.added == len({*texts, ""}) == 945
    assert "Repeated prompts: 2, kept in the set, encoded once." in done.words
