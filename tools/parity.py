"""Is this CausalWan the original network? Rolls recorded trajectories out again and compares.

    python tools/parity.py --reference recorded.safetensors --tolerance 1e-4

The file holds what an original implementation did with its own weights and noise:

    model.*                          state dict, original names
    noise [1, F, C, H, W]            initial noise, chunk after chunk
    renoise [1, chunks, steps - 1, frames per chunk, C, H, W]
    context [1, L, text_dim]         text states
    warped_timesteps [steps]         noise levels as the network sees them
    latents.full [1, F, C, H, W]     nothing evicted
    latents.window{W}                rolling window of W frames, the current chunk included
    latents.window{W}_sink{S}        the same with S first frames as a sink

(other tensors are not read)
and, as a Python literal under `config` in its metadata, the constructor's arguments with H and W
(latent) and the frames per chunk. Prints one line per trajectory; exits 0 only if the largest
absolute difference of each is within the tolerance. On a GPU (`--device cuda`) float32 stays
float32: TF32 is off.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_kv import rollout
from lightning_kv.models.checkpoints import Checkpoint, load_into
from lightning_kv.models.embedded import read_weights
from lightning_kv.models.precision import PROFILES
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import policy_from_dict

NEEDED = ("noise", "renoise", "context", "warped_timesteps")
FIXED = {"qk_norm": True, "cross_attn_norm": True, "model_type": "t2v"}


@dataclass
class Recording:
    """What a file holds.

    Args:
        config: Sizes and conventions.
        tensors: By name, the weights left out.
        weights: State dict, original names.
    """

    config: WanConfig
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read and check a file.

        Raises:
            ValueError: It is no recording, or an unfinished one.
        """
        tensors, metadata = read_weights(path)
        weights = {
            k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")
        }
        missing = [name for name in NEEDED if name not in tensors]
        if missing or not weights or "config" not in metadata:
            raise ValueError(
                f"{path} is no recording: it lacks {missing or 'weights or config'}. "
                "See the top of this script for what it must hold."
            )
        tensors = {k: v for k, v in tensors.items() if not k.startswith("model.")}
        try:
            config = config_of(ast.literal_eval(metadata["config"]), tensors)
        except (ValueError, SyntaxError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The metadata `config` of {path} cannot be used ({error!r}): "
                f"{metadata['config'][:200]!r}. It is a Python literal: a dict with dim, ffn_dim, "
                "num_layers, num_heads, H and W."
            ) from error
        return cls(config, tensors, weights)

    def noise(self, chunk: int, step: int) -> Tensor:
        """The recorded noise."""
        size = self.config.chunk
        if step == 0:
            return self.tensors["noise"][:, size * chunk : size * (chunk + 1)]
        count = self.noise(chunk, 0).shape[1]
        return self.tensors["renoise"][:, chunk, step - 1, :count]

    def model(self, profile: str, device: str = "cpu") -> VideoModel:
        """The network with the recorded weights."""
        network = CausalWan(self.config)
        load_into(network, Checkpoint(self.weights, "original", "safetensors", None, "", None))
        text = self.tensors["context"].to(device)
        return VideoModel(network.cast(profile).to(device), None, lambda prompts: text)

    def trajectories(self) -> Iterator[tuple[str, dict]]:
        """Name of each recorded trajectory, and the policy that makes it.

        Raises:
            ValueError: There is none, or one whose name says no policy.
        """
        names = sorted(name for name in self.tensors if name.startswith("latents."))
        if not names:
            raise ValueError("The file holds no trajectory: no tensor is called latents.*.")
        for name in names:
            yield name, policy_of(name, self.config.chunk)


def config_of(made: dict, tensors: dict[str, Tensor]) -> WanConfig:
    """Our configuration from the recorded constructor's arguments and tensors.

    Raises:
        ValueError: The recorded network is of another kind.
    """
    other = {name: made[name] for name, value in FIXED.items() if made.get(name, value) != value}
    if other:
        raise ValueError(f"this network has {other}, causal Wan is {FIXED}")
    size = tuple(tensors["noise"].shape[-2:])
    if (made.get("H", size[0]), made.get("W", size[1])) != size:
        raise ValueError(f"H and W are {made.get('H')} and {made.get('W')}, the noise has {size}")
    plain = {
        "freq_dim": made.get("freq_dim"),
        "eps": made.get("eps"),
        "text_len": made.get("text_len"),
        "channels": made.get("in_dim"),
        "patch": tuple(made["patch_size"]) if "patch_size" in made else None,
    }
    return WanConfig(
        dim=made["dim"],
        ffn_dim=made["ffn_dim"],
        layers=made["num_layers"],
        heads=made["num_heads"],
        text_dim=made.get("text_dim", tensors["context"].shape[-1]),
        latent_size=size,
        chunk=made.get("frames_per_chunk", tensors["renoise"].shape[3]),
        short_last=True,
        timesteps=tuple(tensors["warped_timesteps"].double().tolist()),
        **{name: value for name, value in plain.items() if value is not None},
    )


def policy_of(name: str, chunk: int) -> dict:
    """Parts of the policy that a trajectory is called after.

    >>> policy_of("latents.window9_sink1", 3)["retain"]
    {'part': 'window', 'sink': 1, 'budget': '6f'}

    Raises:
        ValueError: The name says none.
    """
    if name == "latents.full":
        return {"name": name}
    found = re.fullmatch(r"latents\.window(\d+)(?:_sink(\d+))?", name)
    window, sink = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if window < chunk + sink:
        raise ValueError(
            f"The trajectory {name!r} names no policy for chunks of {chunk} frames. Known are "
            "latents.full, latents.window{W} and latents.window{W}_sink{S}, where W holds the "
            "chunk and the sink."
        )
    if window == chunk:  # no history: a budget has one frame at least, a reach may have none
        return {"name": name, "select": {"part": "reach", "reach": window, "sink": 0}}
    budget = f"{window - chunk}f"  # a window counts the current chunk, a budget does not
    return {"name": name, "retain": {"part": "window", "sink": sink, "budget": budget}}


def difference(recording: Recording, model: VideoModel, name: str, parts: dict) -> float:
    """Largest absolute difference between a trajectory and ours.

    Raises:
        ValueError: The recording does not fit together.
    """
    recorded, noise = recording.tensors[name], recording.tensors["noise"]
    frames = recorded.shape[1]
    uneven = frames % recording.config.chunk and "retain" in parts
    if recorded.shape != noise[:, :frames].shape or uneven:
        raise ValueError(
            f"{name} has the shape {tuple(recorded.shape)}, the noise {tuple(noise.shape)}, in "
            f"chunks of {recording.config.chunk} frames. Record noise for every frame, and whole "
            "chunks under a window."
        )
    if "budget" in parts.get("retain", {}):  # no shorter rollout than the window needs it
        history = frames - recording.config.chunk
        if int(parts["retain"]["budget"][:-1]) >= history:
            parts = {"name": name}
    out = rollout(
        model,
        policy_from_dict(parts),
        "recorded",
        frames,
        noise=recording.noise,
        latent_size=tuple(recorded.shape[-2:]),
        decode=False,
    )
    worst = (out.latents.float().cpu() - recorded.float()).abs().max()
    return float(worst) if bool(worst.isfinite()) else math.inf


def exact() -> None:
    """No TF32 on a GPU; convolutions have it by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def main() -> int:
    """Compare every trajectory of a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, help="file of the format above")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (1e-4)")
    parser.add_argument("--precision", choices=PROFILES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    exact()
    try:
        recording = Recording.read(chosen.reference)
        model, trajectories = (
            recording.model(chosen.precision, chosen.device),
            [*recording.trajectories()],
        )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    failed = 0
    for name, parts in trajectories:
        try:
            worst = difference(recording, model, name, parts)
        except (ValueError, RuntimeError, IndexError) as error:
            sys.stderr.write(f"error: {name} cannot be rolled out again: {error}\n")
            return 2
        good = worst <= chosen.tolerance and worst < math.inf
        failed += not good
        shape = tuple(recording.tensors[name].shape)
        word = "within" if good else "BEYOND"
        print(f"{name:28} {shape!s:24} largest difference {worst:.2e}  {word} {chosen.tolerance:g}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
