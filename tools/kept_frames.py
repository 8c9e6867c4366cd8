"""Draw which frames one head keeps under several policies, over what the reference looks at.

python tools/kept_frames.py --out docs/kept_frames.png

Each panel is one rollout of the same world: from left to right the chunks that are made, upwards
the frames that have been made. Grey is the softmax mass that the head of the full cache pays a
frame in that chunk, coloured are the frames that the policy holds when the chunk begins; so a
policy is good where colour covers grey. The head is the one that pays most to a few frames
long past in the reference rollout, unless it is named. Frames of the chunk itself are left out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from lightning_kv import load_model, load_policy, rollout
from lightning_kv.cache.view import PassView
from lightning_kv.calibration.memory import frames_held
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.tasks.rollouts.context import start_of
from lightning_kv.tasks.rollouts.settings import RolloutSettings

POLICIES = ("oracle@6f", "distilled@6f", "future-forcing@6f")
DARKEST = 0.3  # of a softmax mass


class Held:
    """Notes the frames that each head of each layer holds when a chunk begins.

    Attributes:
        frames: By chunk, bool ``[H, frames so far]`` of each layer.
    """

    def __init__(self) -> None:
        self.frames: dict[int, list[Tensor]] = {}

    def __call__(self, view: PassView) -> None:
        """Note them, in the first pass of a chunk."""
        if view.step.opens:
            self.frames.setdefault(view.step.chunk, []).append(frames_held(view))

    def of(self, layer: int, head: int, frames: int) -> Tensor:
        """Of one head, bool ``[chunks, frames]``."""
        found = torch.zeros(max(self.frames) + 1, frames, dtype=torch.bool)
        for chunk, layers in self.frames.items():
            own = layers[layer][head]
            found[chunk, : len(own)] = own
        return found


def searching(mass: Tensor, chunk: int) -> tuple[int, int]:
    """The layer and head that pay most to a few frames long past, of mass ``[C, L, H, F]``."""
    frames = torch.arange(mass.shape[-1])
    start = torch.arange(len(mass)).view(-1, 1, 1, 1) * chunk
    past = mass * (frames < start - 2 * chunk)
    return divmod(int(past.topk(chunk, -1).values.sum((0, 3)).argmax()), mass.shape[2])


def draw(policies: Sequence[str], prompt: int, seed: int, head: str | None, out: Path) -> None:
    """Roll out, and write the picture."""
    model, chunk = load_model("panorama"), 3
    data = PromptDataModule("data/panorama-fast13", prompts=prompt + 1, seed=seed)
    sample = list(data.prompt_samples())[prompt]
    settings = RolloutSettings(72, 15, None, 0, "", "sdpa").filled(None)
    start = start_of(sample, model, settings)
    told = {
        "frames": settings.frames,
        "keys": [sample.key],
        "context": start.context.unsqueeze(0),
        "decode": False,
    }
    loaded = {name: load_policy(name) for name in policies}
    needs = {"mass": {}}
    for policy in loaded.values():
        needs |= policy.needs
    reference = rollout(model, load_policy("full"), sample.prompt, record=needs, **told)
    mass = reference.tables["mass"][0].mass["cond"]
    layer, place = searching(mass, chunk) if head is None else map(int, head.split("."))
    figure, axes = plt.subplots(1, len(loaded), figsize=(4.2 * len(loaded), 4.4), sharey=True)
    looked = mass[:, layer, place].clone()
    for own in range(len(looked)):
        looked[own, own * chunk :] = 0
    for axis, (name, policy) in zip(axes, loaded.items(), strict=True):
        watch = Held()
        tables = {need: reference.tables[need] for need in policy.needs}
        rollout(model, policy, sample.prompt, tables=tables, watch=watch, **told)
        held = watch.of(layer, place, settings.frames)
        covered = float(
            (looked * held)[settings.context_frames // chunk :].sum()
            / looked[settings.context_frames // chunk :].sum()
        )
        axis.imshow(
            looked.T,
            origin="lower",
            cmap="Greys",
            vmin=0,
            vmax=DARKEST,
            aspect="auto",
            interpolation="nearest",
        )
        chunks, frames = held.nonzero(as_tuple=True)
        axis.scatter(
            chunks,
            frames,
            s=16,
            marker="s",
            facecolors="none",
            edgecolors="tab:orange",
            linewidth=1.1,
        )
        axis.set_title(f"{Path(name).name}: holds {covered:.0%} of what is looked at", fontsize=10)
        axis.set_xlabel("chunk that is made")
    axes[0].set_ylabel("frame in memory")
    figure.suptitle(f"{sample.prompt}, layer {layer}, head {place}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--policies", default=",".join(POLICIES), help="names or files")
    parser.add_argument("--prompt", type=int, default=0, help="which of the set, from 0")
    parser.add_argument("--seed", type=int, default=0, help="of the worlds")
    parser.add_argument("--head", help="LAYER.HEAD; that which searches the past most")
    parser.add_argument("--out", type=Path, default=Path("kept_frames.png"))
    given = parser.parse_args()
    draw(given.policies.split(","), given.prompt, given.seed, given.head, given.out)
