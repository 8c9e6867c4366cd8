"""What is installed and works here: packages, devices, attention kernels, weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_kv.cache import kernels
from lightning_kv.cache.kernels import BACKENDS
from lightning_kv.models.catalogue import CATALOGUE, PARTS, Download
from lightning_kv.models.embedded import WEIGHTS, read_weights
from lightning_kv.models.loading import memory_of
from lightning_kv.utilities.formatting import format_bytes
from lightning_kv.utilities.model_folders import free_disk, models_folder

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Group

State = Literal["ok", "missing", "fails"]

WAN = ("diffusers", "transformers", "ftfy", "huggingface_hub")
"""Packages of the optional extra ``[wan]``."""

INSTALL = 'pip install "lightning_kv[wan]"'

REQUIRED_KERNELS = ("sdpa", "reference")
"""Kernels that work wherever torch does: one that does not is a broken installation."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Largest difference from attention in float64, for normal queries, keys and values."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What.
        state: ``ok``, ``missing`` (not there, or not for this device) or ``fails``.
        detail: What was found, or what to do.
        required: Nothing works right without it.
    """

    name: str
    state: State
    detail: str
    required: bool = False

    @property
    def bad(self) -> bool:
        """Whether it must be put right."""
        return self.required and self.state != "ok"


@dataclass(frozen=True)
class Diagnosis:
    """What was found, by section.

    Args:
        sections: Checks under the name of their section.
    """

    sections: dict[str, tuple[Check, ...]]

    @property
    def healthy(self) -> bool:
        """Whether everything that is required is there and works."""
        return not self.problems

    @property
    def problems(self) -> list[Check]:
        """What must be put right."""
        return [check for checks in self.sections.values() for check in checks if check.bad]

    @property
    def words(self) -> list[str]:
        """The verdict in sentences."""
        if self.healthy:
            return ["Everything that is required is here and works."]
        count = len(self.problems)
        many = "One thing that is" if count == 1 else f"{count} things that are"
        return [f"{many} required must be put right:"] + [
            f"{check.name} {check.state}: {check.detail}." for check in self.problems
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sections = {name: [asdict(c) for c in checks] for name, checks in self.sections.items()}
        return {"healthy": self.healthy, "sections": sections}


def doctor() -> Diagnosis:
    """Look at this installation, offline and in seconds.

    Nothing heavy is imported: the optional packages are looked up, not loaded. Every attention
    kernel runs once, on every device, on a tiny problem whose answer is known.
    """
    return Diagnosis(
        {
            "packages": tuple(_packages()),
            "optional packages": tuple(_optional(name) for name in WAN),
            "devices": (_cpu(), *_gpus()),
            "attention kernels": tuple(
                check for device in _devices() for check in check_kernels(device)
            ),
            "weights": (
                _embedded(),
                *(_weights(one) for one in {**CATALOGUE, **PARTS}.values()),
                _disk(),
            ),
        }
    )


def render(diagnosis: Diagnosis) -> Group:
    """Short tables, one a section, and the verdict; they fit into 100 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for section, checks in diagnosis.sections.items():
        table = Table(title=section, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.title_style = "bold"
        table.show_header = False
        table.add_column(no_wrap=True, min_width=24)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            style = {"ok": "green", "missing": "red" if check.bad else "dim", "fails": "red"}
            table.add_row(
                Text(check.name), Text(check.state, style[check.state]), Text(check.detail)
            )
        parts += [table, ""]
    return Group(*parts, *(Text(sentence, "bold") for sentence in diagnosis.words))


def _packages() -> list[Check]:
    """This package and what it requires, with the versions it asks for."""
    try:
        version = importlib.metadata.version("lightning_kv")
    except importlib.metadata.PackageNotFoundError:
        detail = "not installed: run `pip install -e .` where its pyproject.toml is"
        return [Check("lightning_kv", "missing", detail, required=True)]
    ours = Check("lightning_kv", "ok", version, required=True)
    return [ours, _python(), *(_package(one) for one in _requirements())]


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("lightning_kv")["Requires-Python"]
    here = platform.python_version()
    detail = f"{here} on {platform.platform()} (required: {wanted})"
    fits = SpecifierSet(wanted).contains(here, prereleases=True)
    return Check("python", "ok" if fits else "fails", detail, required=True)


def _requirements() -> list[Requirement]:
    """What this package asks for, extras left out."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in importlib.metadata.requires("lightning_kv") or ()]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _package(needed: Requirement) -> Check:
    name, wanted = needed.name, str(needed.specifier)
    install = f'`pip install "{name}{wanted}"`'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", f"not installed: {install}", required=True)
    if not needed.specifier.contains(version, prereleases=True):
        detail = f"{version} is installed, {wanted} is required: {install}"
        return Check(name, "fails", detail, required=True)
    return Check(name, "ok", f"{version} (required: {wanted})", required=True)


def _optional(name: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, "missing", f"for Wan models: `{INSTALL}`")
    return Check(name, "ok", importlib.metadata.version(name))


def _cpu() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{cores} cores, {torch.get_num_threads()} threads for torch"
    if hasattr(os, "sysconf"):
        detail += f", {format_bytes(memory_of(torch.device('cpu')))} memory"
    return Check("cpu", "ok", detail, required=True)


def _gpus() -> list[Check]:
    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    built = f"CUDA {torch.version.cuda}, and finds none" if torch.version.cuda else "CPU alone"
    return [Check("cuda", "missing", f"no GPU: torch is built for {built}")]


def _gpu(index: int) -> Check:
    about = torch.cuda.get_device_properties(index)
    half = "bfloat16" if about.major >= 8 else "no bfloat16"
    detail = (
        f"{about.name}, {format_bytes(about.total_memory)}, capability "
        f"{about.major}.{about.minor}, {half}, CUDA {torch.version.cuda}, driver {_driver()}"
    )
    return Check(f"cuda:{index}", "ok", detail)


def _driver() -> str:
    """Version of the NVIDIA driver."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=3,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not answer)"
    return asked.stdout.splitlines()[0].strip()


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``q, k, v [1, H, T, D]`` to ``[1, H, T, D]``."""


def check_kernels(device: str) -> list[Check]:
    """Run every attention kernel once on a device, in bfloat16 on a GPU and float32 on a CPU."""
    checks = [
        try_kernel(f"{name} on {device}", partial(_ours, name), device, name in REQUIRED_KERNELS)
        for name in BACKENDS
    ]
    theirs = {
        "torch flash": partial(_fused, "FLASH_ATTENTION"),
        "torch memory-efficient": partial(_fused, "EFFICIENT_ATTENTION"),
        "torch cudnn": partial(_fused, "CUDNN_ATTENTION"),
        "torch math": partial(_fused, "MATH"),
        "torch varlen_attn": _varlen,
        "torch flex_attention": _flex,
        "flash-attn package": _flash_attn,
    }
    return checks + [try_kernel(f"{n} on {device}", run, device) for n, run in theirs.items()]


def try_kernel(name: str, kernel: Attention, device: str, required: bool = False) -> Check:
    """Compare a kernel with softmax attention in float64 on a tiny random problem.

    Args:
        name: What it is called.
        kernel: ``q, k, v [1, 2, 16, 32]`` to the same shape.
        device: Where.
        required: Nothing works right without it.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 32, generator=rng).to(device, dtype) for _ in range(3))
    exact = (q.double() @ k.double().mT / 32**0.5).softmax(-1) @ v.double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch says why a kernel will not run in warnings
        try:
            off = (kernel(q, k, v).double() - exact).abs().max().item()
        except Exception as error:  # whatever a kernel raises where it cannot run is the finding
            return Check(name, "missing", _reason(error, said), required)
    kind = str(dtype).removeprefix("torch.")
    detail = f"differs from float64 by {off:.1e} in {kind}"
    return Check(name, "ok" if off <= TOLERANCE[dtype] else "fails", detail, required)


def _reason(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """The first line of why; torch gives its reasons in warnings, one for each kernel it has."""
    text = str(error)
    if text.startswith(("No available kernel", "No viable backend")):
        others = ("not used because", "runtime disabled")
        reasons = [str(one.message) for one in said]
        reasons = [one for one in reasons if not any(other in one for other in others)]
        text = (reasons or ["torch has no such kernel for this device"])[0]
    lines = text.strip().splitlines() or [type(error).__name__]
    line = lines[0].partition(" (Triggered internally")[0].partition(". This could be because")[0]
    return line.rstrip(". ") if len(line) <= 160 else f"{line[:157]}..."


def _ours(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One of this package's kernels: two heads that read every row."""
    return getattr(kernels, name)(q[0], k[0], v[0], None)[None]


def _fused(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    tokens = q.shape[2]
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    rows = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return varlen_attn(*rows, ends, ends, tokens, tokens).transpose(0, 1)[None]


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("not installed, and not needed")
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _embedded() -> Check:
    path = WEIGHTS / "panorama.safetensors"
    try:
        read_weights(path)
    except ValueError as error:
        state: State = "fails" if path.is_file() else "missing"
        return Check("panorama", state, f"{error} Install the package again", required=True)
    return Check("panorama", "ok", str(path), required=True)


def _weights(one: Download) -> Check:
    root = one.root
    if root is None:
        size = "" if one.size is None else f" ({format_bytes(one.size)})"
        return Check(one.name, "missing", f"not here: `lightning-kv fetch {one.name}`{size}")
    return Check(one.name, "ok", str(root if one.name in PARTS else one.path))


def _disk() -> Check:
    return Check("models folder", "ok", f"{models_folder()}, {format_bytes(free_disk())} free")
