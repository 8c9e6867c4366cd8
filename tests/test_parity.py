"""The parity tool, against an independent network with the cache rule of the originals.

`Original` is the published network as a function of its weights: no module, a buffer of fixed
capacity per layer, eviction by tokens. It is first held against trajectories that the original
code recorded, and then records others that the tool has to accept.
"""

import ast
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.rollout import rollout

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "self_forcing_reference.safetensors"
TOOL = Path(__file__).parents[1] / "tools" / "parity.py"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_file(), reason="the recorded trajectories are not here"
)


# -- an independent network ------------------------------------------------------------------


class Original:
    """The published network and sampler.

    Args:
        weights: Under original names.
        made: Arguments that the recording's metadata holds.
        context: Text states ``[1, L, text_dim]``.
        capacity: Frames that the cache has room for, the unit being generated included.
        sink: Frames at its beginning that stay.
    """

    def __init__(self, weights, made, context, capacity, sink=0):
        self.weights, self.made = weights, made
        self.heads, self.eps = made["num_heads"], made["eps"]
        self.grid = (made["H"] // 2, made["W"] // 2)
        tokens = self.grid[0] * self.grid[1]
        self.capacity, self.sink = capacity * tokens, sink * tokens
        shape = (1, self.capacity, self.heads, made["dim"] // self.heads)
        self.cache = [
            {"k": torch.zeros(shape), "v": torch.zeros(shape), "global_end": 0, "local_end": 0}
            for _ in range(made["num_layers"])
        ]
        text = F.pad(context, (0, 0, 0, made["text_len"] - context.shape[1]))
        text = F.gelu(self.linear("text_embedding.0", text), approximate="tanh")
        self.text = self.linear("text_embedding.2", text)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def rms(self, name, x):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def rotate(self, x, first):
        """Keys or queries ``[1, T, heads, d]`` whose first frame is ``first``."""
        height, width = self.grid
        third = x.shape[-1] // 6
        sizes = (x.shape[-1] // 2 - 2 * third, third, third)  # complex pairs
        frames = x.shape[1] // (height * width)
        places = itertools.product(range(first, first + frames), range(height), range(width))
        places = torch.tensor(list(places), dtype=torch.float64)
        angles = [
            places[:, axis, None] * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
            for axis, n in enumerate(sizes)
        ]
        turn = torch.polar(torch.ones(()).double(), torch.cat(angles, -1))[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    def remember(self, cache, k, v, start):
        """Write a unit; its first pass makes room, a later one overwrites. What may be read."""
        new, end, sink = k.shape[1], start + k.shape[1], self.sink
        if end > cache["global_end"] and cache["local_end"] + new > self.capacity:
            evicted = cache["local_end"] + new - self.capacity
            kept = cache["local_end"] - evicted - sink
            for part in (cache["k"], cache["v"]):
                part[:, sink : sink + kept] = part[:, sink + evicted :][:, :kept].clone()
            cache["local_end"] -= evicted
        cache["local_end"] += end - cache["global_end"]
        cache["global_end"] = end
        high = cache["local_end"]
        cache["k"][:, high - new : high], cache["v"][:, high - new : high] = k, v
        return cache["k"][:, :high], cache["v"][:, :high]

    def attention(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (score @ v).transpose(1, 2).flatten(2)

    def block(self, index, x, modulation, first):
        """One block over ``[1, T, dim]``; six modulations per token."""
        name, tokens = f"blocks.{index}", self.grid[0] * self.grid[1]
        e = [
            part.squeeze(2)
            for part in (self.weights[f"{name}.modulation"] + modulation).chunk(6, 2)
        ]
        shift, scale, gate, shift2, scale2, gate2 = (
            part.repeat_interleave(tokens, 1) for part in e
        )
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        own = f"{name}.self_attn"
        q, k = (self.split(self.rms(f"{own}.norm_{n}", self.linear(f"{own}.{n}", y))) for n in "qk")
        q, k = self.rotate(q, first), self.rotate(k, first)
        v = self.split(self.linear(f"{own}.v", y))
        k, v = self.remember(self.cache[index], k, v, first * tokens)
        x = x + gate * self.linear(f"{own}.o", self.attention(q, k, v))
        cross = f"{name}.cross_attn"
        y = F.layer_norm(
            x,
            x.shape[-1:],
            self.weights[f"{name}.norm3.weight"],
            self.weights[f"{name}.norm3.bias"],
            self.eps,
        )
        q = self.split(self.rms(f"{cross}.norm_q", self.linear(f"{cross}.q", y)))
        k = self.split(self.rms(f"{cross}.norm_k", self.linear(f"{cross}.k", self.text)))
        v = self.split(self.linear(f"{cross}.v", self.text))
        x = x + self.linear(f"{cross}.o", self.attention(q, k, v))
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale2) + shift2
        y = F.gelu(self.linear(f"{name}.ffn.0", y), approximate="tanh")
        return x + gate2 * self.linear(f"{name}.ffn.2", y)

    def velocity(self, x, t, first):
        """Latents ``[1, F, C, H, W]`` at one noise level."""
        height, width = self.grid
        frames, channels = x.shape[1:3]
        patches = x.unflatten(-1, (width, 2)).unflatten(3, (height, 2))  # [1, F, C, h, 2, w, 2]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        kernel = self.weights["patch_embedding.weight"].flatten(1)
        tokens = F.linear(patches, kernel, self.weights["patch_embedding.bias"])
        half = self.made["freq_dim"] // 2
        angles = t * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        time = torch.cat([angles.cos(), angles.sin()]).to(x.dtype).expand(1, frames, -1)
        time = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", time)))
        modulation = self.linear("time_projection.1", F.silu(time)).unflatten(-1, (6, -1))
        for index in range(self.made["num_layers"]):
            tokens = self.block(index, tokens, modulation, first)
        last = self.weights["head.modulation"] + time.unsqueeze(2)
        shift, scale = (
            part.squeeze(2).repeat_interleave(height * width, 1) for part in last.chunk(2, 2)
        )
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps) * (1 + scale) + shift
        out = self.linear("head.head", tokens).view(1, frames, height, width, 2, 2, channels)
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def generate(self, noise, renoise, levels, flows=None):
        """A video, unit after unit: denoise, then write the clean unit's keys at t = 0."""
        size, made = self.made["frames_per_chunk"], []
        for unit, x in enumerate(noise.split(size, 1)):
            for step, t in enumerate(levels):
                v = self.velocity(x, t, unit * size)
                if flows is not None:
                    flows.append(v)
                x0 = (x.double() - t / 1000 * v.double()).to(x.dtype)
                if step + 1 < len(levels):
                    s = levels[step + 1] / 1000
                    x = (1 - s) * x0 + s * renoise[:, unit, step, : x.shape[1]]
            made.append(x0)
            self.velocity(x0, 0.0, unit * size)
        return torch.cat(made, 1)


# -- recordings ------------------------------------------------------------------------------


def random_weights(dim, ffn_dim, layers, text_dim, freq_dim, channels):
    """Original names; large enough that what is remembered shows in what is made."""
    shapes = {
        "patch_embedding": (dim, channels, 1, 2, 2),
        "text_embedding.0": (dim, text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (4 * channels, dim),
    }
    for b in range(layers):
        for part in (f"blocks.{b}.self_attn", f"blocks.{b}.cross_attn"):
            shapes |= {f"{part}.{linear}": (dim, dim) for linear in "qkvo"}
        shapes |= {f"blocks.{b}.ffn.0": (ffn_dim, dim), f"blocks.{b}.ffn.2": (dim, ffn_dim)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0]) / 10
    for b in range(layers):
        weights[f"blocks.{b}.modulation"] = torch.randn(1, 6, dim) / 2
        weights[f"blocks.{b}.norm3.weight"] = 1 + torch.randn(dim) / 5
        weights[f"blocks.{b}.norm3.bias"] = torch.randn(dim) / 5
        for part in ("self_attn", "cross_attn"):
            for norm in ("norm_q", "norm_k"):
                weights[f"blocks.{b}.{part}.{norm}.weight"] = 1 + torch.randn(dim) / 5
    return weights | {"head.modulation": torch.randn(1, 2, dim) / 2}


LEVELS = {1: (1000.0,), 2: (1000.0, 2500 / 3), 4: (1000.0, 937.5, 2500 / 3, 625.0)}
"""Noise levels by the number of steps."""


def record(
    frames=8,
    chunk=2,
    grid=(2, 3),
    heads=2,
    width=12,
    layers=2,
    levels=LEVELS[4],
    text_len=7,
    windows=((4, 1),),
    words=None,
    seed=0,
):
    """Tensors and metadata of a recording; ``windows`` are (frames, sink frames)."""
    torch.manual_seed(seed)
    made = {
        "model_type": "t2v",
        "patch_size": (1, 2, 2),
        "text_len": text_len,
        "in_dim": 4,
        "dim": heads * width,
        "ffn_dim": 2 * heads * width,
        "freq_dim": 16,
        "text_dim": 6,
        "out_dim": 4,
        "num_heads": heads,
        "num_layers": layers,
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "H": 2 * grid[0],
        "W": 2 * grid[1],
        "frames_per_chunk": chunk,
    }
    weights = random_weights(made["dim"], made["ffn_dim"], layers, 6, 16, 4)
    shape = (4, made["H"], made["W"])
    levels = torch.tensor(levels)  # float32, as the originals keep them
    tensors = {
        "noise": torch.randn(1, frames, *shape),
        "renoise": torch.randn(1, -(-frames // chunk), len(levels) - 1, chunk, *shape),
        "context": torch.randn(1, words or text_len, 6),
        "warped_timesteps": levels,
    }

    def run(capacity, sink=0):
        network = Original(weights, made, tensors["context"], capacity, sink)
        return network.generate(tensors["noise"], tensors["renoise"], levels.tolist())

    tensors["latents.full"] = run(frames)
    for window, sink in windows:
        name = f"latents.window{window}" + (f"_sink{sink}" if sink else "")
        tensors[name] = run(window, sink)
    return tensors | {f"model.{k}": v for k, v in weights.items()}, {"config": repr(made)}


def write(path, recording):
    tensors, metadata = recording
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("parity_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_tool"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["parity_tool"]


@pytest.fixture
def parity(tool, monkeypatch, capsys):
    """Run the tool in this process: exit code, lines of its output, its error."""

    def run(path, *words):
        monkeypatch.setattr(sys, "argv", ["parity.py", "--reference", str(path), *map(str, words)])
        code = tool.main()
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


# -- the independent network is the original one ---------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        made = ast.literal_eval(file.metadata()["config"])
    tensors = load_file(GOLDEN)
    return tensors, made, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}


@needs_golden
@pytest.mark.parametrize(
    ("name", "window", "sink"), [("full", 15, 0), ("window6", 6, 0), ("window9_sink1", 9, 1)]
)
def test_the_network_of_these_tests_is_the_recorded_one(golden, name, window, sink):
    tensors, made, weights = golden
    flows = []
    network = Original(weights, made, tensors["context"], window, sink)
    levels = tensors["warped_timesteps"].tolist()
    found = network.generate(tensors["noise"], tensors["renoise"], levels, flows)
    assert (found - tensors[f"latents.{name}"]).abs().max() <= 5e-6
    flows = torch.cat(flows)[None]
    if name == "full":
        assert (flows - tensors["flows.full"]).abs().max() <= 5e-6
    else:  # the trajectory is one that a forgotten window would miss
        assert (found - tensors["latents.full"]).abs().max() > 1e-2


@needs_golden
def test_the_recorded_trajectories_are_ours_through_either_kernel(tool, golden):
    recording = tool.Recording.read(GOLDEN)
    model, trajectories = recording.model("float32"), dict(recording.trajectories())
    assert {"latents.full", "latents.window6", "latents.window9_sink1"} == trajectories.keys()
    for (name, parts), backend in itertools.product(trajectories.items(), ("sdpa", "reference")):
        policy, noise = policy_from_dict(parts), recording.noise
        out = rollout(model, policy, "x", 15, noise=noise, backend=backend, decode=False)
        assert (out.latents - golden[0][name]).abs().max() <= 1e-5, (name, backend)


@needs_golden
def test_the_recorded_file_is_accepted(parity):
    code, lines, error = parity(GOLDEN, "--tolerance", "1e-5")
    assert (code, error) == (0, "")
    names = ["latents.full", "latents.window6", "latents.window9_sink1"]
    assert [line.split()[0] for line in lines] == names
    assert all("(1, 15, 16, 8, 8)" in line and line.endswith("within 1e-05") for line in lines)


# -- what it accepts -------------------------------------------------------------------------


def accepted(parity, path, recording, tolerance=1e-5):
    code, lines, error = parity(write(path, recording), "--tolerance", tolerance)
    wanted = sorted(name for name in recording[0] if name.startswith("latents."))
    assert [line.split()[0] for line in lines] == wanted
    assert (code, error) == (0, ""), lines
    return recording[0]


def beyond(parity, path, recording, tolerance=1e-5):
    """Names that the tool refuses; its exit code has to say so."""
    code, lines, error = parity(write(path, recording), "--tolerance", tolerance)
    found = [line.split()[0] for line in lines if "BEYOND" in line]
    assert (code, error) == (int(bool(found)), "")
    assert all(("BEYOND" in line) != ("within" in line) for line in lines)
    return found


def apart(tensors, name, other="latents.full"):
    return float((tensors[name] - tensors[other]).abs().max())


def test_a_window_that_is_no_multiple_of_the_chunk(parity, tmp_path):
    windows = [(7, 0), (7, 2), (8, 3), (8, 0)]
    found = accepted(parity, tmp_path / "r", record(18, chunk=3, windows=windows))
    assert apart(found, "latents.window7", "latents.window8") > 1e-2
    assert apart(found, "latents.window7", "latents.window7_sink2") > 1e-2
    assert apart(found, "latents.window8_sink3") > 1e-2


def test_the_smallest_windows(parity, tmp_path):
    """No history at all, and nothing but the sink."""
    found = accepted(parity, tmp_path / "r", record(12, chunk=3, windows=[(3, 0), (5, 2), (6, 3)]))
    assert apart(found, "latents.window3") > 1e-2
    assert apart(found, "latents.window5_sink2", "latents.window6_sink3") > 1e-2
    found = accepted(parity, tmp_path / "r", record(9, chunk=1, windows=[(1, 0), (4, 3), (2, 1)]))
    assert apart(found, "latents.window1", "latents.window2_sink1") > 1e-2


def test_windows_longer_than_the_video_forget_nothing(parity, tmp_path):
    windows = [(8, 0), (9, 3), (500, 2), (6, 3)]
    found = accepted(parity, tmp_path / "r", record(8, chunk=2, windows=windows))
    # Buffers of another size may be summed in another order.
    assert apart(found, "latents.window500_sink2") < 1e-5 and apart(found, "latents.window8") < 1e-5
    assert apart(found, "latents.window6_sink3") > 1e-3


def test_a_long_rollout_frame_by_frame(parity, tmp_path):
    given = record(40, 1, (1, 5), layers=1, levels=LEVELS[2], windows=[(6, 1), (21, 3)])
    found = accepted(parity, tmp_path / "r", given)
    assert apart(found, "latents.window21_sink3") > 1e-2
    assert apart(found, "latents.window6_sink1") > 1e-2


def test_text_shorter_than_the_model_takes_is_padded_and_attended(parity, tmp_path):
    tensors, metadata = record(4, text_len=512, words=5, windows=())
    accepted(parity, tmp_path / "r", (tensors, metadata))
    whole = tensors | {"context": F.pad(tensors["context"], (0, 0, 0, 507))}
    accepted(parity, tmp_path / "r", (whole, metadata))
    fewer = {"config": metadata["config"].replace("'text_len': 512", "'text_len': 5")}
    assert beyond(parity, tmp_path / "r", (tensors, fewer)) == ["latents.full"]


@pytest.mark.parametrize("windows", [(), [(3, 0)]], ids=["all", "no history"])
def test_a_last_chunk_that_is_shorter(parity, tmp_path, windows):
    accepted(parity, tmp_path / "r", record(11, chunk=3, windows=windows))


def test_a_window_before_a_last_chunk_that_is_shorter_is_refused(parity, tmp_path):
    """The originals make whole chunks; room for a shorter one would be another policy."""
    code, _, error = parity(write(tmp_path / "r", record(10, chunk=3, windows=[(6, 1)])))
    assert code == 2 and "whole chunks under a window" in error


def test_what_the_configuration_leaves_out_is_read_off_or_wans(parity, tmp_path):
    tensors, metadata = record(6, chunk=2, windows=[(3, 1)])
    made = ast.literal_eval(metadata["config"])
    for name in ("model_type", "qk_norm", "cross_attn_norm", "eps", "text_dim", "patch_size"):
        del made[name]
    del made["frames_per_chunk"]  # renoise has it
    accepted(parity, tmp_path / "r", (tensors, {"config": repr(made)}))


@st.composite
def recordings(draw):
    chunk, steps = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    units = draw(st.integers(2, min(40 // chunk, 24 // (steps + 1))))
    frames, windows = chunk * units, []
    for _ in range(draw(st.integers(1, 2))):
        sink = draw(st.integers(0, 3))
        windows.append((draw(st.integers(chunk + sink, max(chunk + sink, frames + 2))), sink))
    return record(
        frames,
        chunk,
        grid=draw(st.sampled_from([(2, 3), (4, 4), (1, 5)])),
        heads=draw(st.integers(1, 4)),
        width=draw(st.sampled_from([12, 24, 32])),
        layers=draw(st.integers(1, 3)),
        levels=LEVELS[steps],
        text_len=draw(st.sampled_from([7, 512])),
        windows=windows,
        words=draw(st.sampled_from([3, None])),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("recordings") / "r.safetensors"


def test_any_network_and_any_window(tool, shared):
    @settings(max_examples=16, deadline=None, derandomize=True)
    @given(recordings())
    def check(made):
        recording = tool.Recording.read(write(shared, made))
        model = recording.model("float32")
        for name, parts in recording.trajectories():
            assert tool.difference(recording, model, name, parts) <= 1e-5, name

    check()


# -- what it refuses -------------------------------------------------------------------------

SMALL = {"frames": 4, "chunk": 2, "layers": 1, "levels": LEVELS[2], "windows": [(2, 0)]}


@pytest.fixture(scope="module")
def small():
    return record(**SMALL)


def changed(recording, name, by=1e-2, at=0):
    """The same recording with one number of one tensor moved."""
    tensors, metadata = recording
    moved = tensors[name].clone()
    moved.view(-1)[at] += by
    return tensors | {name: moved}, metadata


def test_every_weight_counts(parity, tmp_path, small):
    names = [name for name in small[0] if name.startswith("model.")]
    assert len(names) == 42
    for name in names:
        assert beyond(parity, tmp_path / "r", changed(small, name))[:1] == ["latents.full"], name


@pytest.mark.parametrize("name", ["noise", "renoise", "context"])
def test_every_input_counts(parity, tmp_path, small, name):
    assert "latents.full" in beyond(parity, tmp_path / "r", changed(small, name))


@pytest.mark.parametrize("by", [1e-2, -1e-2, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["latents.full", "latents.window2"])
def test_one_value_of_one_trajectory_is_enough(parity, tmp_path, small, name, by):
    for at in (0, -1):
        assert beyond(parity, tmp_path / "r", changed(small, name, by, at)) == [name]


def test_a_trajectory_under_another_name_is_another(parity, tmp_path):
    windows = [(5, 0), (6, 1), (6, 2)]
    tensors, metadata = record(12, chunk=3, windows=windows)
    names = [name for name in tensors if name.startswith("latents.")]
    for name, other in itertools.permutations(names, 2):
        alone = {k: v for k, v in tensors.items() if not k.startswith("latents.")}
        assert beyond(parity, tmp_path / "r", (alone | {other: tensors[name]}, metadata)) == [other]


def test_the_tolerance_is_the_one_that_is_given(parity, tmp_path, small):
    moved = changed(small, "latents.full", 1e-2)
    for tolerance, refused in ((9e-3, ["latents.full"]), (1.1e-2, [])):
        assert beyond(parity, tmp_path / "r", moved, tolerance) == refused
    assert beyond(parity, tmp_path / "r", small, 0) == ["latents.full", "latents.window2"]
    write(tmp_path / "r", changed(small, "latents.full", 2e-4))
    assert parity(tmp_path / "r")[0] == 1  # 1e-4 where none is given
    write(tmp_path / "r", changed(small, "latents.full", 5e-5))
    assert parity(tmp_path / "r")[0] == 0


def test_lower_precision_is_near_but_not_equal(parity, tmp_path, small):
    write(tmp_path / "r", small)
    for precision in ("reference", "fast"):
        assert parity(tmp_path / "r", "--precision", precision, "--tolerance", "0.2")[0] == 0
        assert parity(tmp_path / "r", "--precision", precision, "--tolerance", "1e-4")[0] == 1


def without(*names):
    return lambda tensors, made: [tensors.pop(name) for name in names]


def trajectories_away(tensors, made):
    for name in [name for name in tensors if name.startswith("latents.")]:
        del tensors[name]


def weights_away(tensors, made):
    for name in [name for name in tensors if name.startswith("model.")]:
        del tensors[name]


def another(name):
    return lambda tensors, made: tensors.update({name: tensors["latents.full"].clone()})


REFUSED = {
    "no noise": (without("noise"), ["lacks ['noise']"]),
    "no renoise and context": (without("renoise", "context"), ["['renoise', 'context']"]),
    "no levels": (without("warped_timesteps"), ["['warped_timesteps']"]),
    "no weights": (weights_away, ["lacks weights or config"]),
    "a weight is missing": (
        without("model.blocks.0.self_attn.q.bias"),
        ["1 missing (blocks.0.self_attn.q.bias)", "dim 24, 1 layers"],
    ),
    "a weight too many": (
        lambda tensors, made: tensors.update({"model.more": torch.zeros(1)}),
        ["1 unexpected (more)"],
    ),
    "another size": (
        lambda tensors, made: made.update(ffn_dim=49),
        ["of another shape", "blocks.0.ffn.0.weight [48, 24] for [49, 24]"],
    ),
    "no trajectory": (trajectories_away, ["no trajectory", "latents.*"]),
    "unknown name": (another("latents.sink3"), ["'latents.sink3'", "latents.window{W}"]),
    "half a name": (another("latents.window4_sink"), ["'latents.window4_sink'"]),
    "window below the chunk": (another("latents.window1"), ["'latents.window1'", "chunks of 2"]),
    "window below sink and chunk": (another("latents.window4_sink3"), ["holds the chunk and the"]),
    "no norm of queries": (
        lambda tensors, made: made.update(qk_norm=False),
        ["{'qk_norm': False}"],
    ),
    "image to video": (lambda tensors, made: made.update(model_type="i2v"), ["'i2v'", "'t2v'"]),
    **{
        f"no {name}": (lambda tensors, made, name=name: made.pop(name), [f"KeyError('{name}')"])
        for name in ("dim", "ffn_dim", "num_layers", "num_heads")
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_recording_that_cannot_be_used_is_said(parity, tmp_path, small, what):
    change, words = REFUSED[what]
    tensors, made = dict(small[0]), ast.literal_eval(small[1]["config"])
    change(tensors, made)
    code, lines, error = parity(write(tmp_path / "r", (tensors, {"config": repr(made)})))
    assert (code, lines) == (2, []) and error.startswith("error: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize("config", ["dict(dim=3)", "{'dim': 3", "", "__import__('os')"])
def test_a_configuration_that_is_no_literal_is_said(parity, tmp_path, small, config):
    code, lines, error = parity(write(tmp_path / "r", (small[0], {"config": config})))
    assert (code, lines) == (2, [])
    assert "metadata `config`" in error and repr(config) in error and "Python literal" in error


def test_no_configuration_at_all_is_said(parity, tmp_path, small):
    code, lines, error = parity(write(tmp_path / "r", (small[0], None)))
    assert (code, lines) == (2, []) and "lacks weights or config" in error


def test_a_file_that_cannot_be_read_is_said(parity, tmp_path, small):
    path = tmp_path / "r.safetensors"
    code, lines, error = parity(path)
    assert (code, lines) == (2, []) and f"No weights file {path}" in error
    content = write(path, small).read_bytes()
    for size in (0, 7, 1000, len(content) - 1):
        path.write_bytes(content[:size])
        code, lines, error = parity(path)
        assert (code, lines) == (2, [])
        assert f"({size} bytes) cannot be read as safetensors" in error


def test_the_command_line_passes_on_the_verdict(tmp_path, small):
    path = write(tmp_path / "r", changed(small, "latents.window2"))
    words = [sys.executable, TOOL, "--reference", path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert ["BEYOND" in line for line in done.stdout.splitlines()] == [False, True]


CONTRADICTIONS = {
    "a list as configuration": lambda tensors, made: [1],
    "heads that do not divide the width": lambda tensors, made: made.update(num_heads=5),
    "more frames than noise": lambda tensors, made: tensors.update(noise=tensors["noise"][:, :2]),
    "fewer steps of noise than levels": lambda tensors, made: tensors.update(
        renoise=tensors["renoise"][:, :, :0]
    ),
    "longer texts than the model takes": lambda tensors, made: made.update(text_len=3),
    "latents of another size": lambda tensors, made: tensors.update(
        {"latents.full": tensors["latents.full"][..., :4]}
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_recording_that_contradicts_itself_is_said(parity, tmp_path, small, what):
    tensors, made = dict(small[0]), ast.literal_eval(small[1]["config"])
    config = repr(CONTRADICTIONS[what](tensors, made) or made)
    code, _, error = parity(write(tmp_path / "r", (tensors, {"config": config})))
    assert code == 2 and error.startswith("error: ")
