"""Benchmark of rollouts: its clocks, its bytes, and the hard-wired cache it compares with."""

import gc
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.precision import PROFILES
from lightning_kv.models.samplers import ChunkPlan, few_step
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.vae import WanVAE
from lightning_kv.models.wan import CausalWan
from lightning_kv.tasks.benchmark import rollouts as bench
from lightning_kv.tasks.benchmark import timing
from lightning_kv.tasks.benchmark.rollouts import PLAIN, Bench, BenchOptions, PlainCache
from lightning_kv.tasks.benchmark.timing import Run, Work

TOOL = Path(__file__).parents[3] / "tools" / "bench_rollout.py"
SINK = "sink-window@9f"
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    ),
]


def options(**changes):
    usual = {"preset": "tiny", "device": "cpu", "precision": "float32", "repeats": 1}
    return BenchOptions(**(usual | changes))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_rollout", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(tool, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench_rollout.py", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "120")
    return tool.main()


@pytest.mark.parametrize("device", DEVICES)
def test_the_tool_reports_every_policy(device, tool, monkeypatch, tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ("--preset", "tiny", "--device", device, "--precision", "float32", "--repeats", 2)
    assert call(tool, monkeypatch, *words, "--json", out) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert list(found["policies"]) == ["full", SINK, "sliding-window@18f"]
    assert all(name in printed for name in found["policies"])
    where = found["environment"]
    assert where["size"] == [64, 64] and where["tokens_per_frame"] == 16 and where["steps"] == 4
    assert where["torch"] == torch.__version__ and where["attention"] == "sdpa"
    assert where["threads"] == torch.get_num_threads() and where["device_name"]
    for row in found["policies"].values():
        times = row["ms_per_chunk"]
        assert row["status"] == "ok" and len(times["all"]) == len(row["kv"]["chunk_bytes"]) == 10
        assert times["first"] == times["all"][0] and times["last"] == times["all"][-1]
        assert times["worst"] >= max(times["all"][1:]) >= times["median"] > 0
        # 4 denoising passes and one commit pass over the same frames
        assert times["denoise"] > times["commit"] > 0
        assert row["latent_fps"] == pytest.approx(27000 / sum(times["all"][1:]))
        assert row["pixel_fps"] == pytest.approx(4 * row["latent_fps"])
        assert row["ratio_to_full"] > 0
        for name in ("peak_allocated_bytes", "peak_reserved_bytes", "allocated_growth"):
            assert (row[name] is None) == (device == "cpu")
    assert found["policies"]["full"]["ratio_to_full"] == 1
    assert ("not measured" in printed) == (device == "cpu")
    assert found["decode"] is None and "decode" in found["null_means"]
    assert found["overhead"]["largest_difference"] <= 1e-5
    assert len(found["overhead"]["repeats"]) == 2 and found["overhead"]["ratio"] > 0


def test_bytes_are_those_of_the_formula():
    # 2 tensors x 2 layers x 2 heads x width 32 x 16 tokens x 4 bytes
    frame = 2 * 2 * 2 * 32 * 16 * 4
    rows = Bench(options(steps=1)).run()["policies"]
    for name, frames in (("full", 30), (SINK, 12), ("sliding-window@18f", 21)):
        kv = rows[name]["kv"]
        assert kv["frames"] == frames and kv["formula_bytes"] == frames * frame
        assert kv["ratio"] == pytest.approx(1, abs=0.05) and kv["bytes"] == kv["chunk_bytes"][-1]
    # constant from the chunk in which the window is full: 3 chunks of history for 9 frames
    assert len(set(rows[SINK]["kv"]["chunk_bytes"][3:])) == 1
    assert len(set(rows[SINK]["kv"]["chunk_bytes"][:4])) == 4
    assert rows[SINK]["kv"]["growth"] == 0
    assert rows["full"]["kv"]["growth"] == pytest.approx(1, abs=0.02)  # 15 to 30 frames


def test_the_formula_gives_the_published_sizes():
    wan, big = (PRESETS[name].geometry() for name in ("wan-1.3b", "wan-14b"))
    sizes = [bench.kv_bytes(geometry, frames) / 2 for geometry, frames in ((wan, 1), (big, 21))]
    assert sizes[0] == 287_539_200
    assert sizes[1] / 2**30 == pytest.approx(24.99, abs=0.01)


@pytest.mark.parametrize("precision", PROFILES)
def test_the_hard_wired_cache_makes_the_same_video(precision):
    usual = {"policies": ("full", SINK), "size": "32x64", "chunks": 5, "steps": 2}
    made = Bench(options(precision=precision, **usual))
    full, plain, window = (made.once(name).latents for name in ("full", PLAIN, SINK))
    assert full.shape == (1, 15, 16, 4, 8)
    assert (full - plain).abs().max() <= (1e-5 if precision == "float32" else 0.02)
    # 9 of 12 history frames in the last chunk: the comparison sees a cache that forgets
    apart = (full - window).abs().double().mean((0, 2, 3, 4))
    rounding = 1e-6 if precision == "float32" else 5e-4  # on average; what is forgotten moves 4e-3
    assert apart[:12].max() <= rounding and apart[12:].min() > 4 * rounding


def test_the_hard_wired_cache_attends_to_all_that_came_before():
    geometry = BenchOptions(preset="tiny", device="cpu").config.geometry((4, 4))
    cache, rng = PlainCache(geometry, 2), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 2, 32, generator=rng, dtype=torch.float64) for _ in range(3))
    for frame in range(2):
        step = Pass("commit", (frame,), (0.0,), frame, final=(frame,))
        one = slice(4 * frame, 4 * frame + 4)
        out = cache.attend(0, q[:, one], k[:, one], v[:, one], step)
    place = torch.tensor([[t, r, c] for t in range(2) for r in range(2) for c in range(2)])
    turn = torch.exp(1j * geometry.rotary.angles(*place.unbind(1))).unsqueeze(1)
    pairs = [torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn for x in (q, k)]
    q, k = (torch.view_as_real(x).flatten(-2).transpose(1, 2) for x in pairs)
    expected = scaled_dot_product_attention(q[:, :, 4:], k, v.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-12)


def test_time_goes_to_the_pass_that_took_it(monkeypatch):
    now = [0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    run = Run(torch.device("cpu"), PlainCache(PRESETS["panorama"].geometry(), 6))
    waits = {("denoise", 0): 1, ("denoise", 1): 20, ("commit", 0): 300}

    def noise(chunk, step):
        now[0] += 4000 * chunk
        return torch.zeros(1, 3, 1, 1, 1)

    steps = run.timed(few_step)(ChunkPlan(6, 3), (1000.0, 500.0), noise, None)
    answer = None
    for _ in range(6):
        step, answer = steps.send(answer)
        now[0] += waits[step.phase, step.step]
    with pytest.raises(StopIteration):
        steps.send(answer)
    assert run.denoise == [21, 8021] and run.commit == [300, 300]  # the noise of both steps
    assert run.seconds == [321, 8321]


def test_policies_take_turns_and_medians_are_reported(monkeypatch):
    made, order = Bench(options(policies=(SINK, "full"), repeats=3, chunks=4)), []

    def once(name):
        order.append(name)
        turn = order.count(name) - 1
        pace = (2.0, 4.0, 50.0)[turn]
        run = Run(made.device, None, [9.0, pace, pace, pace + 2], [1.0] * 4)
        run.frames, run.held, run.latents = [0.0, 3.0, 6.0, 9.0], [1, 2, 3, 4], torch.ones(1) * turn
        if name == PLAIN:
            run.denoise = [2 * seconds for seconds in run.denoise]
        return run

    monkeypatch.setattr(made, "once", once)
    found = made.run()
    assert order == [SINK, "full", PLAIN] * 3
    times = found["policies"]["full"]["ms_per_chunk"]
    assert times.pop("all") == [10000, 5000, 5000, 7000]
    expected = {"median": 5000, "first": 10000, "last": 7000, "worst": 53000}
    assert times == expected | {"denoise": 4000, "commit": 1000}
    assert found["policies"][SINK]["latent_fps"] == pytest.approx(9 / 17)
    assert found["overhead"]["repeats"] == pytest.approx([3 / 5, 5 / 9, 51 / 101])
    assert found["overhead"]["ratio"] == pytest.approx(5 / 9)
    assert found["policies"]["full"]["kv"]["growth"] is None  # no 6 chunks


def test_a_rollout_leaves_no_cache_behind():
    made = Bench(options(policies=("full",), chunks=2, steps=1))
    gc.collect()
    before = sum(type(item) in (CacheSession, PlainCache) for item in gc.get_objects())
    kept = [made.once(name) for name in ("full", PLAIN)]
    gc.collect()
    after = sum(type(item) in (CacheSession, PlainCache) for item in gc.get_objects())
    assert after == before and len(kept[0].held) == 2


def test_a_policy_without_room_does_not_stop_the_others(tool, monkeypatch, tmp_path, capsys):
    real, calls = bench.rollout, []

    def full_device(model, policy, *given, **how):
        calls.append(policy.name)
        if policy.name == SINK:
            torch.empty(2**60, dtype=torch.uint8)
        return real(model, policy, *given, **how)

    monkeypatch.setattr(bench, "rollout", full_device)
    words = (
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--chunks",
        5,
        "--steps",
        1,
    )
    words += ("--policies", f"{SINK},full", "--json", tmp_path / "b.json", "--repeats", 2)
    assert call(tool, monkeypatch, *words) == 1
    rows = json.loads((tmp_path / "b.json").read_text())["policies"]
    assert rows[SINK]["status"] == "out of memory" and rows["full"]["status"] == "ok"
    for said in ("1152921504606846976", "chunk 1 of 5", "639 KiB", "3 frames 48.0 KiB"):
        assert said in rows[SINK]["reason"]
    assert rows[SINK]["reason"].split(",")[0] in capsys.readouterr().out
    assert calls == [SINK, *["full"] * 4]  # twice with a session, twice hard-wired


def test_other_errors_are_not_taken_for_missing_memory():
    with pytest.raises(RuntimeError, match="size of tensor"):
        try:
            torch.ones(2) + torch.ones(3)
        except RuntimeError as error:
            bench.out_of_memory(error)
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
    assert bench.out_of_memory(torch.OutOfMemoryError(said)) == "Tried to allocate 2.50 GiB"


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(7)
    before, made = torch.get_rng_state(), {}
    for seed in (0, 0, 1):
        model = bench.random_model(options(seed=seed, precision="fast"))
        made.setdefault(seed, []).append(
            torch.cat([p.flatten() for p in model.network.parameters()])
        )
    assert torch.equal(*made[0]) and not torch.equal(made[0][0], made[1][0])
    assert made[0][0].dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert options().weight_bytes == 4 * sum(
        p.numel() for p in CausalWan(options().config).parameters()
    )


def test_decoding_is_timed_by_chunk(tool):
    diffusers = pytest.importorskip("diffusers")
    small = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    made = Bench(options(policies=("full",), chunks=3))
    codec = WanVAE(diffusers.AutoencoderKLWan(**small).eval().requires_grad_(False))
    found = tool.decode(made, codec)
    times = found["ms_per_chunk"]["all"]
    assert len(times) == 3 and min(times) > 0 and found["held_bytes"] > 0
    assert found["pixel_fps"] == pytest.approx(1000 * 24 / sum(times[1:]))  # 12 pixel frames each
    assert found["peak_allocated_bytes"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "wan-1.3"], "Did you mean 'wan-1.3b'"),
        (["--size", "60x64"], "Use 64 x 64"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--chunks", "0"], "--chunks 0"),
        (["--chunks", "1"], "Give 2 or more"),
        (["--chunks", "4"], "between 1f and 9f"),  # the default budget of 18 frames
        (["--steps", "0"], "--steps 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--precision", "fp8"], "float32, reference, fast"),
        (["--policies", "ful"], "Did you mean 'full'"),
        (["--policies", "full,full"], "each of them once"),
        (["--policies", ","], "give one or more"),
        (["--json", "no/such/folder/b.json"], "No folder"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(words, said, tool, monkeypatch, capsys):
    monkeypatch.setattr(bench, "random_model", lambda options: pytest.fail("weights were made"))
    assert call(tool, monkeypatch, "--preset", "tiny", "--device", "cpu", *words) == 2
    assert said in capsys.readouterr().err


def test_cuda_needs_a_gpu(tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(tool, monkeypatch, "--preset", "tiny", "--device", "cuda") == 2
    assert "Use --device cpu" in capsys.readouterr().err


def test_the_vae_needs_the_extra(tool, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert call(tool, monkeypatch, "--preset", "tiny", "--device", "cpu", "--vae") == 2
    assert 'pip install "lightning_kv[wan]"' in capsys.readouterr().err


def test_steps_are_as_many_as_asked_for():
    assert options(steps=2).config.timesteps == (1000, 500)
    assert len(options().config.timesteps) == 4


def test_the_flop_limit_is_that_of_the_rows_that_are_read():
    made = Bench(options(policies=(SINK,), chunks=8))
    run, passes = made.once(SINK), 5
    tokens, config = 3 * 16, made.config  # of a pass
    read = [passes * tokens * 2 * 2 * 16 * min(3 * chunk, 9) for chunk in range(8)]
    whole = [passes * tokens * 2 * 2 * 16 * 3 * chunk for chunk in range(8)]
    assert run.work == [
        Work(passes * tokens, passes * tokens**2, *rows) for rows in zip(read, whole, strict=True)
    ]
    # q, k, v, o, q and o of the text, two layers of the MLP; then own rows and the text
    linear = 2 * tokens * (6 * 64 * 64 + 2 * 64 * 128)
    fixed = 2 * passes * (linear + 4 * tokens * tokens * 64 + 4 * tokens * 512 * 64)
    assert run.work[2].flops(config, 0) == fixed
    own, full = (sum(fixed + 4 * 32 * rows for rows in each[1:]) for each in (read, whole))
    row = made.row([run])
    assert row["flop_limit"] == pytest.approx(full / own)
    assert row["flops_per_second"] == pytest.approx(own / 7 * row["latent_fps"] / 3)


def test_another_sampler_is_timed_by_finished_chunk():
    made = Bench(options(policies=("full",), chunks=6, sampler="rolling"))
    run = made.once("full")
    assert made.geometry.flight == 12 and len(run.seconds) == len(run.work) == 6
    assert run.work[0].queries == 16 * (3 + 6 + 9 + 12 + 3)  # chunks enter until four are in flight
    assert run.work[1].queries == 16 * (12 + 3)
    with pytest.raises(ValueError, match="sampler"):
        Bench(options(sampler="runge-kutta"))
