"""Does everything work on this GPU, how fast, and where does the host wait for it?

    bash tools/gpu_check.sh --out gpu_check --golden recorded.safetensors
    bash tools/gpu_check.sh --device cpu --preset tiny        # the same steps without a GPU

Steps, each in its own process with its own time limit, so that none stops another:

    tests     tests/test_gpu.py
    parity    trajectories recorded from an original implementation (tools/parity.py)
    seeds     every preset twice with one seed: the same latents
    bench     time, memory and host waits of policies at a real size, with random weights
    profile   one chunk of Focused Forcing, operation by operation

Writes gpu_check.json and gpu_check.txt into --out; exits 1 if a step failed. A step is `ok`,
`failed` or `not run`; all but the first say why. Together they take at most 8 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench_rollout import shown, table
from parity import Recording, difference, exact
from rich.console import Console

from lightning_kv import load_model, preset, rollout
from lightning_kv.cache.passes import Pass
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.registry import presets, sized
from lightning_kv.tasks.benchmark.rollouts import CONFIGS, PLAIN, REFERENCE, Bench, BenchOptions
from lightning_kv.tasks.benchmark.timing import Run, looked_at
from lightning_kv.tasks.benchmark.waits import KINDS, counting
from lightning_kv.utilities.formatting import format_bytes

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden" / "self_forcing_reference.safetensors"
TOLERANCE = 1e-4
CHUNKS = 8
FOCUSED = "focused-forcing@6f"  # the paper's form: for each query frame, in every pass
ONCE = "focused-once"
ONCE_FILE = """\
name: focused-once
select: {part: focused, budget: 6f, per_query_frame: false, refresh: chunk}
"""
POLICIES = (
    *(REFERENCE, "sliding-window@18f", "sink-window@9f", FOCUSED, ONCE),
    *("future-forcing@9f", "h2o@9f", "infinity-rope"),
)
ROLLING = "rolling-forcing"
LIMITS = {"tests": 110, "parity": 40, "seeds": 75, "bench": 185, "profile": 50}
WHOLE = 470  # seconds
NULLS = {
    "peak_allocated_bytes": "torch counts the bytes of a CUDA device only",
    "peak_reserved_bytes": "torch counts the bytes of a CUDA device only",
    "allocated_growth": "torch counts the bytes of a CUDA device only",
    "speedup": "`full` was not measured with the same sampler",
    "waits": "counted in a rollout of its own, for which there was no time",
    "difference": "not a finite number",
    "largest_difference": "not a finite number",
    "overhead": "the hard-wired cache was not measured",
    "device_ms": "there is no CUDA device",
    "idle_share": "there is no CUDA device",
}
Save = Callable[[dict[str, Any]], None]


# -- steps: each gets the options and a way to save, and gives plain data with a status ----------


def tests(chosen: argparse.Namespace, save: Save) -> dict[str, Any]:
    """The tests that need a GPU."""
    words = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-p", "no:cacheprovider"]
    words += ["-vv", "--tb=line", "-rfE"]
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1, left(chosen) - 5),
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = None, error.stdout or b""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    results = [re.search(r"::.* (PASSED|FAILED|ERROR|SKIPPED)", line) for line in lines]
    counts = {word.lower(): 0 for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    for word in (found[1].lower() for found in results if found):
        counts[word] += 1
    found = {
        **counts,
        "summary": lines[-1].strip("= ") if lines else None,
        "failures": [line[:400] for line in lines if re.match(r"(FAILED|ERROR) ", line)],
    }
    if code is None:
        return found | failed("stopped at the time limit of the step")
    if code or not counts["passed"] + counts["skipped"]:
        return found | {"output": lines[-40:]} | failed(f"pytest: {found['summary']}")
    if not counts["passed"]:
        return found | {"status": "not run", "reason": f"pytest: {found['summary']}"}
    return found | OK


def parity(chosen: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Largest difference to each recorded trajectory, in float32."""
    if not chosen.golden.is_file():
        return {"status": "not run", "reason": "no file of recorded trajectories; give --golden"}
    exact()
    recording = Recording.read(chosen.golden)
    model = recording.model("float32", chosen.device)
    found = {
        name: difference(recording, model, name, parts) for name, parts in recording.trajectories()
    }
    beyond = [name for name, worst in found.items() if not worst <= TOLERANCE]
    found = {"tolerance": TOLERANCE, "largest_difference": found}
    return found | (failed(f"beyond the tolerance: {', '.join(beyond)}") if beyond else OK)


def seeds(chosen: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Every preset twice with the same seed, on the embedded model in float32."""
    exact()
    model, frames = load_model(), 24 if chosen.device == "cuda" else 12
    moved = (x.to(chosen.device) for x in (model.network, model.codec, model.encoder))
    model, rows = VideoModel(*moved), {}
    for name in presets(without_tables=True, any_model=True):
        spec = sized(name, "6f")
        try:
            one, two = (
                rollout(model, preset(spec), "dusk fast n10 left", frames, decode=False).latents
                for _ in range(2)
            )
        except Exception as error:
            rows[spec] = failed(reason(error))
        else:
            same, apart = torch.equal(one, two), float((one - two).abs().max())
            rows[spec] = (OK if same else failed("two rollouts differ")) | {"difference": apart}
        save({"frames": frames, "policies": rows})
    bad = [spec for spec, row in rows.items() if row["status"] != "ok"]
    found = {"frames": frames, "policies": rows}
    return found | (failed(f"not the same twice: {', '.join(bad)}") if bad else OK)


def bench(chosen: argparse.Namespace, save: Save) -> dict[str, Any]:
    """One rollout of each policy, then their host waits, then repeats in what time is left."""
    once = chosen.part.parent / f"{ONCE}.yaml"
    once.write_text(ONCE_FILE)
    specs = tuple(str(once) if name == ONCE else name for name in POLICIES)
    few = Turns(chosen, specs)
    rolling = Turns(chosen, (ROLLING, REFERENCE), "rolling")
    rolling.share(few)
    first = [(few, spec) for spec in specs] + [(rolling, ROLLING)]
    jobs = [(turns, spec, False) for turns, spec in first]
    jobs += [(turns, spec, True) for turns, spec in first]
    last = [(rolling, REFERENCE, False), (few, PLAIN, False)]
    jobs += last
    if chosen.device == "cuda":  # the times of a CPU are of no interest here
        jobs += [(turns, spec, False) for turns, spec in first] + last
    for turns, spec, waits in jobs:
        turns.next(spec, waits)
        save(found := {"settings": settings(few.bench), **merged(few, rolling)})
    rows = found["policies"]
    bad = {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"}
    why = "; ".join(f"{name}: {said}" for name, said in bad.items())
    return found | (failed(why) if bad else OK)


def profile(chosen: argparse.Namespace, save: Save) -> dict[str, Any]:
    """One steady chunk of Focused Forcing under torch's profiler."""
    made, cuda = Bench(options(chosen, (FOCUSED,))), chosen.device == "cuda"
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])])
    chunk, clock = CHUNKS - 2, []

    def before(step: Pass) -> None:
        if step.opens and step.chunk == chunk:  # the device is idle between two chunks
            profiler.start()
            clock.append(time.perf_counter())

    def after(step: Pass) -> None:
        if step.phase == "commit" and step.chunk == chunk:
            if cuda:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
            profiler.stop()

    run = made.once(FOCUSED, lambda sampler: looked_at(sampler, before, after))
    if run.failure:
        return failed(run.failure)
    events = list(profiler.key_averages())
    device = torch.autograd.DeviceType
    host = [event for event in events if event.device_type == device.CPU]
    kernels = [event for event in events if event.device_type == device.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1000 if cuda else None
    wall = 1000 * run.seconds[chunk - 1]
    waiting = [event for event in host if re.search("cuda.*Synchronize", event.key)]
    return OK | {
        "policy": FOCUSED,
        "chunk": chunk,
        "by": "device" if cuda else "host",
        "chunk_ms": 1000 * (clock[1] - clock[0]),
        "chunk_before_ms": wall,
        "host_ms": sum(event.self_cpu_time_total for event in host) / 1000,
        "host_synchronize_ms": sum(event.self_cpu_time_total for event in waiting) / 1000,
        "device_ms": busy,
        "idle_share": max(0.0, 1 - busy / wall) if cuda else None,
        "launches": sum(e.count for e in host if re.search("Launch(Cooperative)?Kernel", e.key)),
        "operations": largest(host, cuda),
        "kernels": largest(kernels, cuda),
    }


STEPS: dict[str, Callable[[argparse.Namespace, Save], dict[str, Any]]] = {
    step.__name__: step for step in (tests, parity, seeds, bench, profile)
}
OK = {"status": "ok", "reason": None}


def failed(why: str) -> dict[str, Any]:
    """The status of a step or of a part of one."""
    return {"status": "failed", "reason": why}


def reason(error: Exception) -> str:
    """Kind and text of an error, its first 300 characters."""
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def left(chosen: argparse.Namespace) -> float:
    """Seconds until the limit of this step."""
    return chosen.until - time.time()


# -- the benchmark ---------------------------------------------------------------------------


def options(
    chosen: argparse.Namespace, policies: tuple[str, ...], sampler: str | None = None
) -> BenchOptions:
    """Of the benchmark; CPUs are slow in bfloat16."""
    return BenchOptions(
        preset=chosen.preset,
        policies=policies,
        chunks=CHUNKS,
        precision="fast" if chosen.device == "cuda" else "float32",
        device=chosen.device,
        sampler=sampler,
    )


class Turns:
    """Rollouts of one benchmark, as long as there is time."""

    def __init__(
        self, chosen: argparse.Namespace, policies: tuple[str, ...], sampler: str | None = None
    ) -> None:
        self.chosen, self.bench = chosen, Bench(options(chosen, policies, sampler))
        self.runs: dict[str, list[Run]] = {name: [] for name in (*policies, PLAIN)}
        self.waits: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.took: dict[str, float] = {}

    def share(self, other: Turns) -> None:
        """Use the weights of another: they are the same, and peaks count all there are."""
        network = copy.copy(other.bench.model.network)
        network.config = self.bench.config
        self.bench.model = replace(other.bench.model, network=network)

    def next(self, name: str, waits: bool) -> None:
        """One more rollout, for its time or for its waits; nothing where it would take too long."""
        expected = self.took.get(name, max(self.took.values(), default=0.0))
        if name in self.failures or 1.5 * expected > left(self.chosen) - 5:
            return
        began = time.time()
        try:
            if waits:
                with counting(self.chosen.device) as count:
                    run = self.bench.once(name, count.watched)
                if not run.failure:
                    self.waits[name] = count.summary(CHUNKS - 2)
            else:
                self.runs[name].append(run := self.bench.once(name))
            if run.failure:
                self.failures[name] = f"out of memory: {run.failure}"
        except Exception as error:
            self.failures[name] = reason(error)
        self.took[name] = time.time() - began

    def rows(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """By policy, and what the session costs beyond a hard-wired cache."""
        found = self.bench.report({name: runs for name, runs in self.runs.items() if runs})
        rows = found["policies"]
        full = rows.get(REFERENCE, {}).get("latent_fps")
        for name in self.bench.policies:
            row = rows.setdefault(name, {"status": "not run", "reason": "there was no time"})
            if row["status"] == "ok":
                row |= {"reason": None, "repeats": len(self.runs[name])}
                row["speedup"] = row["latent_fps"] / full if full else None
                row["kv_held_bytes"] = row["kv"]["bytes"]
            if name in self.failures:
                row |= failed(self.failures[name])
            row["waits"] = self.waits.get(name)
        return rows, found["overhead"]


def merged(few: Turns, rolling: Turns) -> dict[str, Any]:
    """Rows of both samplers under short names."""
    rows, overhead = few.rows()
    rows = {name if ".yaml" not in name else Path(name).stem: row for name, row in rows.items()}
    rows |= {f"{name}, rolling": row for name, row in rolling.rows()[0].items()}
    return {"policies": rows, "overhead": overhead}


def settings(made: Bench) -> dict[str, Any]:
    """What was measured."""
    found = asdict(made.options) | {"latent_size": made.size, "steps": len(made.config.timesteps)}
    del found["size"], found["policies"], found["sampler"], found["repeats"]
    return found | {
        "weight_bytes": made.options.weight_bytes,
        "tokens_per_frame": made.geometry.tokens,
        "waits_by": "torch's synchronisation debug mode"
        if made.device.type == "cuda"
        else "operations that would wait on a GPU",
    }


def largest(events: list[Any], cuda: bool) -> list[dict[str, Any]]:
    """The ten events that take the most time themselves."""
    times = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) for e in events}
    total, calls = sum(times.values()), {e.key: e.count for e in events}
    ten = sorted((key for key in times if times[key] > 0), key=times.get, reverse=True)[:10]
    return [
        {"name": k, "calls": calls[k], "ms": times[k] / 1000, "share": times[k] / total}
        for k in ten
    ]


# -- what is written -------------------------------------------------------------------------


def environment(chosen: argparse.Namespace) -> dict[str, Any]:
    """Device and versions."""
    cuda, driver = chosen.device == "cuda" and torch.cuda.is_available(), None
    if cuda and (tool := shutil.which("nvidia-smi")):
        words = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(words, capture_output=True, text=True, timeout=20)
            driver = (done.stdout.split() or [None])[0]
    return {
        "device": chosen.device,
        "device_name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "preset": chosen.preset,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The text file."""
    where = found["environment"]
    console.print(", ".join(f"{k} {shown(v, str)}" for k, v in where.items()))
    for name, step in found["steps"].items():
        why = f": {step['reason']}" if step["reason"] else ""
        console.print(f"\n== {name}: {step['status']}{why} ({step['seconds']:.0f} s)")
        try:
            SHOWN[name](step, console)
        except (KeyError, TypeError):  # a step that was cut off has only part of its numbers
            console.print("The rest was not measured.")


def show_tests(step: dict[str, Any], console: Console) -> None:
    """Summary and failures."""
    if step.get("summary"):
        console.print(step["summary"], *step["failures"], sep="\n")


def show_parity(step: dict[str, Any], console: Console) -> None:
    """A line per trajectory."""
    for name, worst in step.get("largest_difference", {}).items():
        console.print(f"{name:28} largest difference {worst:.2e} (tolerance {TOLERANCE:g})")


def show_seeds(step: dict[str, Any], console: Console) -> None:
    """A line per policy that is not the same twice."""
    rows = step.get("policies")
    if not rows:
        return
    same = [name for name, row in rows.items() if row["status"] == "ok"]
    console.print(f"The same twice: {', '.join(same) or 'none'}")
    for name, row in rows.items():
        if row["status"] != "ok":
            apart = shown(row.get("difference"), "{:.2e}")
            console.print(f"{name}: {row['reason']} (largest difference {apart})")


def show_bench(step: dict[str, Any], console: Console) -> None:
    """Time and memory, then waits and the lines that wait."""
    if "policies" not in step:
        return
    console.print(", ".join(f"{name} {value}" for name, value in step["settings"].items()))
    speed = table(
        "Speed over full, and the most that reading less can give (FLOPs)",
        *("policy", "ms per\nchunk", "latent\nfps", "pixel\nfps", "speed-\nup", "FLOP\nlimit"),
        *("TFLOP\nper s", "peak\nallocated", "KV\nheld", "re-\npeats"),
    )
    waits = table("Host waits in a steady chunk", "policy", *KINDS, "total")
    for name, row in step["policies"].items():
        if "latent_fps" not in row:
            console.print(f"{name}: {row['status']}, {row['reason']}")
            continue
        speed.add_row(
            name,
            f"{row['ms_per_chunk']['median']:.1f}",
            *(f"{row[key]:.2f}" for key in ("latent_fps", "pixel_fps")),
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
            f"{row['flop_limit']:.2f}",
            f"{row['flops_per_second'] / 1e12:.1f}",
            "-"
            if row["peak_allocated_bytes"] is None
            else format_bytes(row["peak_allocated_bytes"]),
            format_bytes(row["kv_held_bytes"]),
            str(row["repeats"]),
        )
        if row["waits"]:
            own = row["waits"]
            waits.add_row(name, *(str(own["by_pass"][kind]) for kind in KINDS), str(own["total"]))
    console.print(speed, waits, sep="\n")
    price = step["overhead"]
    said = f"{price['ratio']:.3f} times" if price["status"] == "ok" else price["reason"]
    console.print(f"`full` over a hard-wired cache: {said}")
    for name, row in step["policies"].items():
        if row["waits"]:
            own = row["waits"]["lines"]
            lines = (f"{x['line'].removeprefix('lightning_kv/')} {x['waits']}x" for x in own)
            console.print(f"{name} waits at: {', '.join(lines)}")


def show_profile(step: dict[str, Any], console: Console) -> None:
    """Totals and the ten largest."""
    if "chunk_ms" not in step:
        return
    console.print(
        f"{step['policy']}, chunk {step['chunk']}: {step['chunk_ms']:.1f} ms under the profiler "
        f"(the chunk before, without it: {step['chunk_before_ms']:.1f} ms); host "
        f"{step['host_ms']:.1f} ms, of which synchronising {step['host_synchronize_ms']:.1f} ms; "
        f"device {shown(step['device_ms'], '{:.1f} ms')}, idle "
        f"{shown(step['idle_share'], '{:.0%}')}; {step['launches']} kernel launches"
    )
    for kind in ("operations", "kernels"):
        made = table(f"Largest {kind} by their own {step['by']} time", kind, "calls", "ms", "share")
        for row in step[kind]:
            made.add_row(
                row["name"][:66], str(row["calls"]), f"{row['ms']:.2f}", f"{row['share']:.1%}"
            )
        if step[kind]:
            console.print(made)


SHOWN = {
    "tests": show_tests,
    "parity": show_parity,
    "seeds": show_seeds,
    "bench": show_bench,
    "profile": show_profile,
}


# -- one process per step --------------------------------------------------------------------


def step(name: str, words: list[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Run a step in a process of its own; what it saved before it was cut off is kept."""
    part, log, began = folder / f"{name}.json", folder / f"{name}.log", time.time()
    until = str(began + seconds)
    words = [sys.executable, __file__, *words, "--child", name, "--part", str(part)]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [*words, "--until", until], stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(child.pid, signal.SIGKILL)  # its own children too
            child.wait()
    found = json.loads(part.read_text()) if part.is_file() else {}
    if code is None:
        found |= failed(f"stopped at its limit of {seconds:.0f} s")
    elif "status" not in found:
        last = log.read_text(errors="replace").strip().splitlines()[-15:]
        found |= failed(f"ended with {code}: {last[-1] if last else 'it said nothing'}")
        found["output"] = last
    return found | {"seconds": time.time() - began}


def child(chosen: argparse.Namespace) -> int:
    """The process of one step."""

    def save(found: dict[str, Any]) -> None:
        aside = chosen.part.with_suffix(".new")
        aside.write_text(json.dumps(found, default=str))
        aside.replace(chosen.part)

    try:
        found = STEPS[chosen.child](chosen, save)
    except Exception as error:
        saved = json.loads(chosen.part.read_text()) if chosen.part.is_file() else {}
        found = saved | failed(reason(error))
        sys.excepthook(*sys.exc_info())
    save(found)
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder (gpu_check)")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--preset", choices=CONFIGS, default="wan-1.3b", help="network of bench")
    made.add_argument("--golden", type=Path, default=GOLDEN, help="recorded trajectories")
    made.add_argument("--steps", default=",".join(STEPS), help="which, with commas (all)")
    made.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    made.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return made


def main() -> int:
    """Run every step, write and show."""
    made = parser()
    chosen = made.parse_args()
    if chosen.child:
        return child(chosen)
    wanted, began = chosen.steps.split(","), time.time()
    if unknown := set(wanted) - set(STEPS):
        made.error(f"--steps: no {', '.join(sorted(unknown))}; known are {', '.join(STEPS)}")
    words = ["--device", chosen.device, "--preset", chosen.preset]
    words += ["--golden", str(chosen.golden.absolute())]
    chosen.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"environment": environment(chosen), "steps": {}, "null_means": NULLS}
    here = chosen.device == "cpu" or torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        for name, limit in LIMITS.items():
            seconds = min(limit, WHOLE - (time.time() - began))
            why = "not asked for with --steps" if name not in wanted else None
            why = why or (None if here else "torch finds no CUDA GPU")
            why = why or (None if seconds > 5 else "no time was left")
            found["steps"][name] = (
                {"status": "not run", "reason": why, "seconds": 0.0}
                if why
                else step(name, words, Path(folder), seconds)
            )
            print(f"{name}: {found['steps'][name]['status']}", flush=True)
            write(found | {"seconds": time.time() - began}, chosen.out)
    print((chosen.out / "gpu_check.txt").read_text())
    return int(any(row["status"] == "failed" for row in found["steps"].values()))


def write(found: dict[str, Any], out: Path) -> None:
    """Both files; after every step, so that there is something if the machine goes away."""
    plain = json.dumps(finite(found), indent=1, allow_nan=False)
    (out / "gpu_check.json").write_text(plain + "\n", encoding="utf-8")
    text = io.StringIO()
    show(found, Console(file=text, width=100, no_color=True, highlight=False, markup=False))
    lines = "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
    (out / "gpu_check.txt").write_text(lines, encoding="utf-8")


def finite(value: Any) -> Any:
    """The same data with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    raise SystemExit(main())
