"""How fast are rollouts of a real size here, and what do they hold in memory?

The network has random weights: no checkpoint is needed, and the time is the same.

    python tools/bench_rollout.py --preset wan-1.3b --chunks 20 --json bench.json
    python tools/bench_rollout.py --preset tiny --device cpu --precision float32

Policies are rolled out in turns, and medians over the turns are shown. The first chunk warms up and
is dropped. A chunk's time is that of its denoising passes and its commit pass, without text and
pixels (--vae times pixels on their own). Latent frames are counted, and pixel frames beside them.
With `full` among the policies, each is compared with it, and it with a cache that is hard-wired
into one buffer per layer: what a cache that asks policies costs. Exits 1 where memory ran out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_kv.models.precision import PROFILES
from lightning_kv.models.text import wan_extra
from lightning_kv.models.vae import LIBRARY, WanVAE
from lightning_kv.tasks.benchmark.rollouts import (
    CONFIGS,
    POLICIES,
    Bench,
    BenchOptions,
    out_of_memory,
    peaks,
    release,
    spread,
)
from lightning_kv.utilities.formatting import format_bytes

NOTHING = "not measured"
NULLS = {
    "peak_allocated_bytes": "torch counts the bytes of a CUDA device only",
    "peak_reserved_bytes": "torch counts the bytes of a CUDA device only",
    "allocated_growth": "torch counts the bytes of a CUDA device only, or fewer than 6 chunks",
    "growth": "fewer than 6 chunks",
    "flop_limit": "no rows were counted",
    "flops_per_second": "no rows were counted",
    "ratio_to_full": "`full` is not among the policies, or had no room",
    "decode": "not asked for with --vae",
}
TIMES = ("median", "first", "last", "worst", "denoise", "commit")


def environment(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on, but for the clock rate of the device."""
    cuda, stride = bench.device.type == "cuda", bench.config.stride[1]
    return asdict(bench.options) | {
        "size": [side * stride for side in bench.size],
        "tokens_per_frame": bench.geometry.tokens,
        "frames_per_chunk": bench.config.chunk,
        "steps": len(bench.config.timesteps),
        "weight_bytes": bench.options.weight_bytes,
        "device_name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "attention": "sdpa",
        "compiled": False,
        "threads": torch.get_num_threads(),
    }


def published_vae(bench: Bench) -> WanVAE:
    """A VAE of the size published with Wan2.1, with random weights.

    Raises:
        ValueError: diffusers is not installed.
    """
    vae = getattr(wan_extra("diffusers"), LIBRARY)().eval().requires_grad_(False)
    return WanVAE(vae).to(bench.device, bench.options.dtype)


def decode(bench: Bench, codec: WanVAE) -> dict[str, Any]:
    """Time of decoding, chunk by chunk as latents come, with the network still in memory."""
    release(bench.device)
    decoder, each, pixels = codec.open(), [], ()
    shape = (bench.config.chunk, codec.vae.config.z_dim, *bench.size)
    try:
        for _ in range(bench.options.chunks):
            latents = torch.randn(shape, device=bench.device)
            began = time.perf_counter()
            pixels = decoder.push(latents)  # on the CPU: there is nothing left to wait for
            each.append(time.perf_counter() - began)
    except RuntimeError as error:
        return {"status": "out of memory", "reason": out_of_memory(error)}
    rate = len(pixels) * len(each[1:]) / sum(each[1:])
    found = {"status": "ok", "pixel_fps": rate, "ms_per_chunk": spread(each)}
    return found | {"held_bytes": decoder.held_bytes, **peaks(bench.device)}


def show(found: dict[str, Any], console: Console) -> None:
    """Two tables and the lines around them; they fit into 120 columns."""
    where, price = found["environment"], found["overhead"]
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), highlight=False)
    speed = table(
        "Frames per second and milliseconds per chunk, the first chunk dropped",
        *("policy", "pixel\nframes/s", "latent\nframes/s", *TIMES, "ratio\nto full"),
    )
    memory = table(
        "Memory (KV: keys and values held while the last chunk is denoised)",
        *("policy", "peak\nallocated", "peak\nreserved", "KV\nframes", "KV held", "KV formula"),
        *("held /\nformula", "KV growth from\nchunk 5 on", "all growth from\nchunk 5 on"),
    )
    for name, row in found["policies"].items():
        if row["status"] != "ok":
            continue
        times, kv = row["ms_per_chunk"], row["kv"]
        rates = [f"{row[key]:.2f}" for key in ("pixel_fps", "latent_fps")]
        ratio = shown(row["ratio_to_full"], "{:.3f}")
        speed.add_row(name, *rates, *(f"{times[key]:.1f}" for key in TIMES), ratio)
        most = [row["peak_allocated_bytes"], row["peak_reserved_bytes"]]
        grown = [shown(value, "{:+.1%}") for value in (kv["growth"], row["allocated_growth"])]
        held = [format_bytes(kv["bytes"]), format_bytes(kv["formula_bytes"]), f"{kv['ratio']:.4f}"]
        frames = f"{kv['frames']:g}"
        memory.add_row(name, *(shown(x, format_bytes) for x in most), frames, *held, *grown)
    console.print(speed, memory)
    for name, row in (*found["policies"].items(), ("decoding", found["decode"])):
        if row and row["status"] != "ok":
            console.print(f"{name}: {row['status']}, {row['reason']}", highlight=False)
    if price["status"] == "ok":
        spans = f"{min(price['repeats']):.3f} to {max(price['repeats']):.3f}"
        price = f"{price['ratio']:.3f} times the hard-wired cache ({spans} over the repeats); "
        price += f"latents differ by at most {found['overhead']['largest_difference']:.1e}"
    else:
        price = f"{NOTHING}: {price['reason']}"
    console.print(f"`full` with a session: {price}", highlight=False)
    if found["decode"] and found["decode"]["status"] == "ok":
        row = found["decode"]
        console.print(
            f"Decoding: {row['pixel_fps']:.2f} pixel frames/s, {row['ms_per_chunk']['median']:.1f} "
            f"ms per chunk, {format_bytes(row['held_bytes'])} kept between chunks, peak "
            f"{shown(row['peak_allocated_bytes'], format_bytes)}",
            highlight=False,
        )


def table(title: str, *headers: str) -> Table:
    """An empty table; all columns but the first hold numbers."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, header in enumerate(headers):
        made.add_column(header, justify="right" if number else "left", overflow="fold")
    return made


def shown(value: float | None, how: Any) -> str:
    """A number, by a function or a format, or that there is none."""
    if value is None:
        return NOTHING
    return how.format(value) if isinstance(how, str) else how(value)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = {field.name: field.default for field in fields(BenchOptions)}
    for name, kind, text in (
        ("preset", str, f"size of the network: {', '.join(CONFIGS)}"),
        ("size", str, "HEIGHTxWIDTH in pixels, multiples of 16; as the preset where not given"),
        ("policies", str, "NAME[@BUDGET] or YAML files, with commas; a budget is history alone"),
        ("chunks", int, "chunks of each rollout; 7 chunks of 3 latent frames show 5 seconds"),
        ("steps", int, "denoising steps per chunk; as the preset where not given"),
        ("precision", str, f"weights and casts: {', '.join(PROFILES)}"),
        ("device", str, "where to run: cuda or cpu"),
        ("repeats", int, "rollouts of each policy"),
        ("seed", int, "of weights, text and noise"),
        ("sampler", str, "few-step or rolling; as the preset where not given"),
    ):
        default = ",".join(POLICIES) if name == "policies" else usual[name]
        text += "" if default is None else f" ({default})"
        among = ("cuda", "cpu") if name == "device" else None
        made.add_argument(f"--{name}", type=kind, default=default, choices=among, help=text)
    made.add_argument("--vae", action="store_true", help="also decode; needs lightning_kv[wan]")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    return made


def main() -> int:
    """Measure, show and write."""
    given = vars(parser().parse_args())
    vae, target = given.pop("vae"), given.pop("json")
    given["policies"] = tuple(filter(None, given["policies"].split(",")))
    try:
        if target and not target.absolute().parent.is_dir():
            raise ValueError(f"No folder for --json {target}. Make it first, or name another file.")
        if vae:
            wan_extra("diffusers")  # say so now, not after the rollouts
        bench = Bench(BenchOptions(**given))
        found = {"environment": environment(bench), **bench.run()}
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    found["null_means"] = NULLS
    found["decode"] = decode(bench, published_vae(bench)) if vae else None
    show(found, Console())
    if target:
        target.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    rows = [*found["policies"].values(), found["decode"] or {"status": "ok"}]
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
