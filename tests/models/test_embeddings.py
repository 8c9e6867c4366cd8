"""Text states on disk: what goes in comes out, the same bytes every time, damage refused."""

import hashlib
import json
import subprocess
import sys
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_kv.data.shards import read_index, write_prompt_shards
from lightning_kv.models.embeddings import (
    PromptBook,
    held_prompts,
    remove_embeddings,
    write_embeddings,
)

PRINT, LENGTH, WIDTH = "f" * 64, 12, 6


def states(prompt):
    """States that depend on the text alone: 1 to LENGTH tokens."""
    digest = hashlib.sha256(prompt.encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randn(1 + digest[4] % LENGTH, WIDTH, generator=rng)


def items(prompts):
    return [(prompt, states(prompt)) for prompt in prompts]


def write(folder, prompts, per_file=4, fingerprint=PRINT):
    return write_embeddings(folder, items(prompts), fingerprint, LENGTH, per_file)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def numbered():
    return [f"prompt {number}" for number in range(10)] + [""]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, unique=True),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_what_goes_in_comes_out_padded_with_zeros(prompts, per_file, random):
    from pathlib import Path

    with TemporaryDirectory() as folder:
        assert write(Path(folder), prompts, per_file) == len(prompts)
        book = PromptBook(Path(folder))
        asked = random.choices(prompts, k=4)
        found = book(asked)
        expected = torch.zeros(4, LENGTH, WIDTH, dtype=torch.bfloat16)
        for row, prompt in zip(expected, asked, strict=True):
            row[: len(states(prompt))] = states(prompt).bfloat16()
        assert torch.equal(found, expected) and found.dtype == torch.bfloat16
        assert book.prompts == prompts


def test_the_layout_on_disk(tmp_path, numbered):
    write(tmp_path, numbered)
    index = json.loads((tmp_path / "embeddings.json").read_text())
    assert {key: index[key] for key in index if key not in ("files", "prompts")} == {
        "schema": 1,
        "fingerprint": PRINT,
        "length": LENGTH,
        "width": WIDTH,
        "dtype": "bfloat16",
    }
    files = [f"embeddings-00000{i}.safetensors" for i in range(3)]
    assert sorted(content(tmp_path)) == sorted([*files, "embeddings.json"])
    for entry, file in zip(index["files"], files, strict=True):
        raw = (tmp_path / file).read_bytes()
        checksum = hashlib.sha256(raw).hexdigest()
        assert entry == {"file": file, "bytes": len(raw), "sha256": checksum}
    for number, (row, prompt) in enumerate(zip(index["prompts"], numbered, strict=True)):
        tokens = len(states(prompt))
        assert row == {"prompt": prompt, "tokens": tokens, "file": files[number // 4]}
        tensors = load_file(tmp_path / row["file"])
        name = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        assert tensors[name].shape == (tokens, WIDTH) and tensors[name].dtype == torch.bfloat16


def test_equal_input_gives_equal_bytes(tmp_path, numbered):
    for name in ("one", "two"):
        write(tmp_path / name, numbered)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    assert write(tmp_path / "one", numbered) == 0  # once more: nothing is written
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("stop", range(11))
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, numbered, stop):
    write(tmp_path / "whole", numbered)

    def interrupted():
        yield from items(numbered[:stop])
        raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(broken, interrupted(), PRINT, LENGTH, 4)
    held = held_prompts(broken, PRINT, LENGTH)
    assert held == numbered[: stop // 4 * 4]
    with pytest.raises(ValueError, match=r"no embeddings.json.*goes on where it was interrupted"):
        PromptBook(broken)
    assert write(broken, [p for p in numbered if p not in held]) == len(numbered) - len(held)
    assert content(broken) == content(tmp_path / "whole")


def test_a_killed_run_leaves_no_half_file(tmp_path, numbered):
    script = (
        "import os, sys, torch, pathlib; from lightning_kv.models import embeddings as e\n"
        "os.fsync = lambda _: os._exit(9)\n"  # dies with the first file written and not yet named
        "e.write_embeddings(pathlib.Path(sys.argv[1]), [('prompt 0', torch.ones(1, 6))], 'x', 12)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == 9 and len(content(tmp_path)) == 1
    write(tmp_path, numbered)
    write(tmp_path / "clean", numbered)
    (whole := content(tmp_path / "clean")).pop("embeddings.json")
    assert whole.items() <= {p.name: p.read_bytes() for p in tmp_path.glob("*.safet*")}.items()
    assert not list(tmp_path.glob(".*"))


def test_a_set_grows_and_keeps_what_it_has(tmp_path, numbered):
    write(tmp_path, numbered[:6])
    before = content(tmp_path)
    assert write(tmp_path, numbered) == 5
    assert PromptBook(tmp_path).prompts == numbered
    del before["embeddings.json"]
    assert before.items() <= content(tmp_path).items()


def test_a_prompt_comes_once(tmp_path):
    assert write(tmp_path, ["a", "b", "a"]) == 2
    assert PromptBook(tmp_path).prompts == ["a", "b"]


def test_items_are_taken_a_file_at_a_time(tmp_path, numbered):
    drawn = []

    def counted():
        for number, item in enumerate(items(numbered)):
            assert len(list(tmp_path.glob("*.safetensors"))) == number // 4
            drawn.append(number)
            yield item

    write_embeddings(tmp_path, counted(), PRINT, LENGTH, 4)
    assert drawn == list(range(11))


def test_prompt_shards_beside_are_not_touched(tmp_path, numbered):
    shards = [(f"k-{i}", {"prompt": prompt or "x"}) for i, prompt in enumerate(numbered)]
    write_prompt_shards(shards, tmp_path, "set", 5)
    before = content(tmp_path)
    write(tmp_path, numbered)
    assert before.items() <= content(tmp_path).items()
    assert read_index(tmp_path).samples == 11 and PromptBook(tmp_path).prompts == numbered
    remove_embeddings(tmp_path)
    assert content(tmp_path) == before


def test_another_encoder_is_refused(tmp_path, numbered):
    write(tmp_path, numbered)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"made by another text encoder.*--force"):
        write(tmp_path, ["new"], fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"made by another text encoder.*length 12"):
        held_prompts(tmp_path, PRINT, LENGTH + 1)
    assert content(tmp_path) == before


@pytest.mark.parametrize("shape", [(0, 6), (13, 6), (3, 5), (6,), (1, 2, 6)])
def test_states_of_another_size_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"'second' have the shape .* with 1 to 12 tokens"):
        pairs = [("first", torch.ones(1, 6)), ("second", torch.ones(shape))]
        write_embeddings(tmp_path, pairs, PRINT, LENGTH)


def test_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one"):
        write(tmp_path, [])


def test_the_book_goes_where_it_is_sent(tmp_path, numbered):
    write(tmp_path, numbered)
    book = PromptBook(tmp_path, dtype=torch.float32)
    assert (book.encoder, book.length, book.width) == (PRINT, LENGTH, WIDTH)
    assert book(numbered[:2]).dtype == torch.float32
    assert book.to("meta") is book and book(numbered[:2]).is_meta
    assert PromptBook(tmp_path, device="meta")(numbered[:1]).is_meta
    holder = torch.nn.ModuleDict({"encoder": PromptBook(tmp_path)}).to("meta")
    assert holder["encoder"](numbered[:1]).is_meta and not holder.state_dict()


def test_an_unknown_prompt_names_the_nearest(tmp_path):
    write(tmp_path, ["a cat sits on a mat", "two dogs run", ""])
    book = PromptBook(tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'a cat sits on a mat'"):
        book(["two dogs run", "a cat sits on the mat"])
    with pytest.raises(ValueError, match=r"'QQQQ'.*3 prompts.*`lightning-kv encode") as error:
        book(["QQQQ"])
    assert "Did you mean" not in str(error.value)


def test_damage_is_found(tmp_path, numbered):
    write(tmp_path, numbered)
    write(tmp_path / "sound", numbered)
    file = tmp_path / "embeddings-000001.safetensors"
    whole = file.read_bytes()
    book = PromptBook(tmp_path)
    book.verify()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    PromptBook(tmp_path)  # the size is right
    with pytest.raises(ValueError, match=r"000001.*another checksum"):
        book.verify()
    for damage in (lambda: file.write_bytes(whole[:-1]), file.unlink):
        damage()
        with pytest.raises(ValueError, match=r"000001.*bytes, the index says.*Delete it and run"):
            PromptBook(tmp_path)
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"000001.*cannot be read"):
        held_prompts(tmp_path, PRINT, LENGTH)
    file.unlink()  # as the message says
    assert write(tmp_path, numbered) == 4
    assert file.read_bytes() == whole
    PromptBook(tmp_path).verify()


def test_a_foreign_index_is_refused(tmp_path, numbered):
    write(tmp_path, numbered)
    path = tmp_path / "embeddings.json"
    index = json.loads(path.read_text())
    outside = json.loads(json.dumps(index).replace("embeddings-000000", "../embeddings-000000"))
    for changed in ("{", "[]", {"schema": 2}, outside, index | {"files": []}):
        changed = index | changed if changed == {"schema": 2} else changed
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(ValueError, match=r"cannot be used.*encode` again"):
            PromptBook(tmp_path)


def test_the_book_needs_no_text_encoder():
    script = (
        "import sys; sys.modules.update(transformers=None, diffusers=None, ftfy=None)\n"
        "import lightning_kv.models.embeddings"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
