"""The doctor: says what is wrong when it is made wrong, and nothing when it is not."""

import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lightning_kv.cache import kernels
from lightning_kv.models.catalogue import CATALOGUE, PARTS
from lightning_kv.tasks import doctor as module
from lightning_kv.tasks.doctor import Check, Diagnosis, check_kernels, doctor, render, try_kernel


@pytest.fixture(autouse=True)
def no_models(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def without_kernels(monkeypatch):
    """Kernels are slow to look at and have tests of their own."""
    monkeypatch.setattr(module, "check_kernels", lambda device: [])


def named(diagnosis, name):
    (found,) = [c for checks in diagnosis.sections.values() for c in checks if c.name == name]
    return found


def test_this_installation_is_healthy():
    found = doctor()
    assert found.healthy and not found.problems
    assert named(found, "sdpa on cpu").state == named(found, "reference on cpu").state == "ok"
    assert named(found, "torch math on cpu").state == "ok"
    for name in ("torch", "lightning", "rich", "safetensors", "av"):
        assert named(found, name).detail.startswith(importlib.metadata.version(name))
    assert {*CATALOGUE, *PARTS} <= {check.name for check in found.sections["weights"]}


def test_it_is_offline_quick_and_loads_no_optional_package():
    script = """
import socket, sys, time
def refuse(*args, **kwargs):
    raise AssertionError("a connection was asked for")
from lightning_kv.tasks.doctor import doctor
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
start = time.perf_counter()
found = doctor()
print(time.perf_counter() - start, found.healthy)
print(*[n for n in ("diffusers", "transformers", "ftfy", "lightning") if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert float(first.split()[0]) < 10 and first.split()[1] == "True"
    assert second == ""


def test_a_requirement_that_is_not_met_is_unhealthy(without_kernels, monkeypatch):
    real = importlib.metadata.version
    old = {"torch": "2.4.1", "torchmetrics": "2.0.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or real(name))
    found = doctor()
    assert not found.healthy
    assert [check.name for check in found.problems] == ["torch", "torchmetrics"]
    assert all(check.state == "fails" for check in found.problems)
    assert "2.4.1 is installed" in named(found, "torch").detail
    assert 'pip install "torch>=2.11"' in named(found, "torch").detail
    assert any("torch" in sentence for sentence in found.words)


def test_a_requirement_that_is_not_there_is_unhealthy(without_kernels, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("lpips", "ftfy"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "ftfy" else spec(n))
    found = doctor()
    assert [check.name for check in found.problems] == ["lpips"]
    assert named(found, "lpips").state == "missing"
    assert named(found, "ftfy") == Check(
        "ftfy", "missing", 'for Wan models: `pip install "lightning_kv[wan]"`'
    )


def test_another_python_is_unhealthy(without_kernels, monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.18")
    assert [check.name for check in doctor().problems] == ["python"]


def test_the_embedded_model_must_be_whole(without_kernels, monkeypatch, tmp_path):
    file = "panorama.safetensors"
    whole = (module.WEIGHTS / file).read_bytes()
    monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    states = []
    for content in (None, whole[: len(whole) // 2], whole):
        if content is not None:
            (tmp_path / file).write_bytes(content)
        found = doctor()
        states.append((named(found, "panorama").state, found.healthy))
    assert states == [("missing", False), ("fails", False), ("ok", True)]


def test_weights_that_are_here_are_named_by_path(without_kernels):
    one = CATALOGUE["causvid"]
    assert named(doctor(), "causvid").detail.startswith("not here: `lightning-kv fetch causvid`")
    (one.folder / one.files[0]).parent.mkdir(parents=True)
    (one.folder / one.files[0]).write_bytes(b"w")
    assert named(doctor(), "causvid") == Check("causvid", "ok", str(one.folder / one.files[0]))
    assert str(one.folder.parent) in named(doctor(), "models folder").detail


def slow(q, k, v):
    """Attention as it is defined, number by number."""
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for row in range(q.shape[2]):
            logits = [torch.dot(q[0, head, row], key).item() / 32**0.5 for key in k[0, head]]
            weights = torch.tensor(logits).exp()
            out[0, head, row] = (weights[:, None] * v[0, head]).sum(0) / weights.sum()
    return out


def test_a_kernel_is_held_against_the_definition():
    assert try_kernel("slow", slow, "cpu").state == "ok"
    off = try_kernel("off", lambda q, k, v: slow(q, k, v) + 0.25, "cpu")
    assert off.state == "fails" and "2.5e-01" in off.detail and "float32" in off.detail
    assert try_kernel("unscaled", lambda q, k, v: slow(q * 2, k, v), "cpu").state == "fails"
    assert try_kernel("nan", lambda q, k, v: slow(q, k, v) * torch.nan, "cpu").state == "fails"

    def cannot(q, k, v):
        raise NotImplementedError("Not on this device.\nA long story follows.")

    assert try_kernel("x", cannot, "cpu") == Check("x", "missing", "Not on this device")


@pytest.mark.parametrize(
    ("name", "healthy"), [("sdpa", False), ("reference", False), ("new", True)]
)
def test_only_our_own_kernels_must_work(monkeypatch, name, healthy):
    right = kernels.reference

    def wrong(q, k, v, bias):
        return right(q, k, v, bias) + 0.01

    monkeypatch.setattr(kernels, name, wrong, raising=False)
    monkeypatch.setattr(module, "BACKENDS", tuple({*module.BACKENDS, name}))
    checks = check_kernels("cpu")
    (found,) = [check for check in checks if check.name == f"{name} on cpu"]
    assert found.state == "fails" and "1.0e-02" in found.detail
    assert Diagnosis({"attention kernels": tuple(checks)}).healthy is healthy


def test_a_kernel_that_torch_does_not_have_here_is_missing_and_says_so():
    found = {check.name: check for check in check_kernels("cpu")}
    assert found["torch cudnn on cpu"].state == "missing"
    assert found["torch cudnn on cpu"].detail == "torch has no such kernel for this device"
    assert found["flash-attn package on cpu"].state == "missing"
    assert not any(check.bad for check in found.values())
    assert all("\n" not in check.detail for check in found.values())


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (
            [
                "Memory efficient kernel not used because: (Triggered internally at x.cpp:1.)",
                "Memory Efficient attention has been runtime disabled. (Triggered internally)",
                "CuDNN attention kernel not used because: (Triggered internally at x.cpp:2.)",
                "cuDNN attention needs sm80. (Triggered internally at x.cpp:3.)",
            ],
            "cuDNN attention needs sm80",
        ),
        ([], "torch has no such kernel for this device"),
    ],
)
def test_torchs_reason_is_taken_from_its_warnings(said, want):
    import warnings

    def kernel(q, k, v):
        for text in said:
            warnings.warn(text, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    assert try_kernel("x", kernel, "cpu") == Check("x", "missing", want)


def test_a_gpu_is_described(without_kernels, monkeypatch):
    about = SimpleNamespace(name="NVIDIA X", total_memory=80 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="550.54.15\n550.54.15\n")
    )
    detail = named(doctor(), "cuda:0").detail
    for part in ("NVIDIA X", "74.5 GiB", "capability 9.0", ", bfloat16", "driver 550.54.15"):
        assert part in detail
    about.major = 7
    assert "no bfloat16" in named(doctor(), "cuda:0").detail

    def absent(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    assert "driver unknown" in named(doctor(), "cuda:0").detail


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu():
    found = {check.name: check for check in check_kernels("cuda:0")}
    assert found["sdpa on cuda:0"].state == found["reference on cuda:0"].state == "ok"
    assert found["torch math on cuda:0"].state == "ok"
    assert not [check for check in found.values() if check.state == "fails"]


def shown(diagnosis):
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(render(diagnosis))
    return out.getvalue()


def test_tables_fit_into_100_columns_and_say_states_in_words(without_kernels):
    found = doctor()
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 100
    for name in found.sections:
        assert name in text
    for checks in found.sections.values():
        for check in checks:
            assert any(
                line.split()[: len(check.name.split()) + 1] == [*check.name.split(), check.state]
                for line in text.splitlines()
            ), check
    assert "Everything that is required is here and works." in text
    bad = Diagnosis({"kernels": (Check("sdpa on cpu", "fails", "off by 1", required=True),)})
    assert "One thing that is required must be put right" in shown(bad)


def test_plain_data_is_json_and_whole(without_kernels):
    found = doctor()
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["healthy"] is True
    rebuilt = Diagnosis(
        {name: tuple(Check(**c) for c in checks) for name, checks in again["sections"].items()}
    )
    assert rebuilt == found
