"""Train the panorama encoder: what clips show, how the camera moves, and what is wrong with it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from lightning_kv.data.panorama import (
    CODES,
    COLUMN,
    PALETTES,
    SCREEN,
    SIZES,
    VISIBLE,
    World,
    draw_prompt,
    ruler_code,
    world_for,
)
from lightning_kv.metrics.backbones.panorama_encoder import CLIP, FEATURES, TOKEN, PanoramaNetwork
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.embedded import WEIGHTS, load_embedded
from lightning_kv.tasks.options import EncoderRecipe, PretrainEncoderOptions
from lightning_kv.tasks.training.artefacts import (
    IMAGE_ARTEFACTS,
    KINDS,
    MOTION_ARTEFACTS,
    DegradedClip,
    draw,
    draw_clip,
    pick,
)
from lightning_kv.tasks.training.module import (
    Training,
    check_numbers,
    commit,
    prepare_training,
    train,
)
from lightning_kv.utilities.files import write_atomic

FIRST_WORLD = 10**9
"""World seeds of the training are this one and the following; 0 to 9999 are left to evaluations."""

STEP = 4  # pixels: unit of camera steps
WIDEST = 6  # wider steps count as one kind


@dataclass
class EncoderBatch:
    """One training step: clips of W worlds, first all clean ones, then the others; B = 2 W.

    Shapes: ``frames`` ``[B, T, 3, 32, 32]``, ``x`` (pixels) and ``intact`` ``[B, T]``, ``strength``
    ``[B, kinds]``, ``palette``, ``stride`` ``[W]``, ``codes`` of the clean clips ``[W, T, 4]``.
    """

    frames: Tensor
    x: Tensor
    intact: Tensor
    strength: Tensor
    palette: Tensor
    stride: Tensor
    codes: Tensor


class EncoderBatches(IterableDataset):
    """Batch number i depends on (seed, i) alone, so that a resumed run sees the same data."""

    def __init__(self, recipe: EncoderRecipe, codec: PatchCodec, start: int) -> None:
        self.recipe, self.codec, self.start = recipe, codec, start

    def __iter__(self):
        for step in range(self.start, self.recipe.steps):
            yield self.draw(step)

    def draw(self, step: int) -> EncoderBatch:
        """Draw the clips of one step."""
        rng = torch.Generator().manual_seed(hash((self.recipe.seed, step)) % 2**63)
        first = FIRST_WORLD + step * self.recipe.worlds
        worlds = [
            world_for(draw_prompt(rng, (SIZES[0], SIZES[-1])).text, first + index)
            for index in range(self.recipe.worlds)
        ]
        clean = [draw_clip(world, self.codec, rng, {}, CLIP) for world in worlds]
        other = [self._spoilt(world, rng) for world in worlds]
        clips = clean + other
        names = list(PALETTES)
        return EncoderBatch(
            *(
                torch.stack([getattr(s, name) for s in clips])
                for name in ("frames", "x", "intact", "strength")
            ),
            torch.tensor([names.index(world.prompt.palette) for world in worlds]),
            torch.tensor([world.prompt.stride for world in worlds]),
            torch.stack(
                [
                    world.codes.unfold(0, VISIBLE, 1)[clip.x // COLUMN]
                    for world, clip in zip(worlds, clean, strict=True)
                ]
            ),
        )

    def _spoilt(self, world: World, rng: torch.Generator) -> DegradedClip:
        """A clip with one or two artefacts, seldom none; often through the codec once more."""
        count = (0, 1, 1, 1, 1, 1, 2, 2)[pick(rng, 0, 7)]
        steered = draw(rng, 0, 1) < 0.5
        groups = [list(MOTION_ARTEFACTS if steered else IMAGE_ARTEFACTS), list(IMAGE_ARTEFACTS)]
        kinds = {group[pick(rng, 0, len(group) - 1)] for group in groups[:count]}
        strength = {kind: draw(rng, 0.2, 1) ** 2 for kind in sorted(kinds)}
        clip = draw_clip(world, self.codec, rng, strength, CLIP, onset=draw(rng, 0, 1) < 0.3)
        if draw(rng, 0, 1) < 0.5:
            clip.frames = self.codec.decode(self.codec.encode(clip.frames))
        return clip


class PretrainEncoder(Training):
    """Trains a :class:`PanoramaNetwork` on facts of worlds and on artefacts.

    Args:
        recipe: What to train, and how long.

    Raises:
        ValueError: A recipe that trains nothing.
    """

    def __init__(self, recipe: EncoderRecipe) -> None:
        check_recipe(recipe)
        super().__init__(recipe.steps)
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = PanoramaNetwork()
            self.column = nn.Sequential(
                nn.Linear(4 * TOKEN, 128), nn.ReLU(), nn.Linear(128, CODES + 6)
            )
            self.pace = nn.Linear(96, 2 * WIDEST + 1)
            self.facts = nn.Linear(FEATURES, len(PALETTES) + 2)
            self.present = nn.Linear(FEATURES, len(KINDS))
            self.amount = nn.Linear(FEATURES, len(KINDS))
        self.codec = load_embedded(WEIGHTS / "panorama.safetensors", "cpu", "float32").codec

    def data(self, start: int) -> EncoderBatches:
        """Clips of each step."""
        return EncoderBatches(
            self.recipe, copy.deepcopy(self.codec).cpu(), start
        )  # worlds are drawn there

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW; only matrices decay."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            groups, lr=1.0, betas=(0.9, 0.98), weight_decay=self.recipe.weight_decay
        )

    def rate(self, step: int) -> float:
        """Warm-up and a half cosine."""
        late = math.cos(math.pi / 2 * min(step / self.steps, 1)) ** 2
        return self.recipe.lr * (min((step + 1) / self.recipe.warmup, 1) * late)

    def measure(self, batch: EncoderBatch) -> dict[str, Tensor]:
        """All losses of a batch, and their sum."""
        net, (clips, length) = self.network, batch.frames.shape[:2]
        tokens = net.tokens(batch.frames.flatten(0, 1))
        movement = net.movement(tokens.unflatten(0, (clips, length)))
        features = net.clip_features(movement)
        losses = {
            **place_losses(net.frame_features(tokens), batch),
            **self._column_losses(tokens, batch),
            "pace": F.cross_entropy(self.pace(movement.mT)[:, 1:].flatten(0, 1), steps(batch.x)),
            **self._fact_losses(features[: clips // 2], batch),
            **self._artefact_losses(features, batch.strength),
            # A distance between sets is as sharp as its features of clean clips are alike.
            "spread": 0.5 * features[: clips // 2].var(0).sum() / features.var(0).sum(),
        }
        return {"loss": sum(losses.values()), **losses}

    def _column_losses(self, tokens: Tensor, batch: EncoderBatch) -> dict[str, Tensor]:
        """What each column of the clean clips is, and where."""
        worlds, length = batch.codes.shape[:2]
        said = self.column(tokens[: worlds * length].permute(0, 3, 1, 2).flatten(2))  # [N, 4, .]
        columns = torch.arange(VISIBLE, device=batch.x.device) + 0.5
        middle = batch.x[:worlds].flatten()[:, None] + COLUMN * columns
        return {
            "code": 0.5 * F.cross_entropy(said[..., :CODES].flatten(0, 1), batch.codes.flatten()),
            "ruler": F.mse_loss(said[..., CODES:], ruler_code(middle)),
        }

    def _fact_losses(self, features: Tensor, batch: EncoderBatch) -> dict[str, Tensor]:
        """Palette and speed, from the features of clean clips."""
        palette, stride = self.facts(features).split([len(PALETTES), 2], dim=1)
        return {
            "palette": 0.2 * F.cross_entropy(palette, batch.palette),
            "speed": 0.2 * F.cross_entropy(stride, batch.stride - 1),
        }

    def _artefact_losses(self, features: Tensor, strength: Tensor) -> dict[str, Tensor]:
        """Which artefacts there are, and how strong."""
        present = F.binary_cross_entropy_with_logits(self.present(features), (strength > 0).float())
        return {
            "present": 4 * present,
            "amount": 40 * F.mse_loss(self.amount(features), strength),
        }


def place_losses(features: Tensor, batch: EncoderBatch) -> dict[str, Tensor]:
    """Cosine of two frames = the share of the screen they have in common, times what is intact.

    Args:
        features: Of all frames, ``[B * T, 64]``.
        batch: Says where each frame was taken.
    """
    unit = F.normalize(features, dim=1)
    x, intact = batch.x.flatten().float(), batch.intact.flatten()
    world = torch.arange(len(batch.palette), device=x.device)
    world = world.repeat(2).repeat_interleave(batch.x.shape[1])
    same = world[:, None] == world
    common = (1 - (x[:, None] - x).abs() / SCREEN).clamp_min(0)
    target = torch.where(same, common * intact[:, None] * intact, 0.0)
    error = (unit @ unit.T - target).square()
    return {"same": 8 * error[same].mean(), "apart": 8 * error[~same].mean()}


def steps(x: Tensor) -> Tensor:
    """Camera steps of clips ``x [B, T]`` (pixels) as classes, ``[B * (T - 1)]``."""
    return (x.diff(dim=1) // STEP).clamp(-WIDEST, WIDEST).flatten() + WIDEST


def check_recipe(recipe: EncoderRecipe) -> None:
    """Refuse a recipe that trains nothing, or comes to nothing on the way.

    Raises:
        ValueError: Names the setting, what it is and what it may be.
    """
    whose = "The panorama encoder"
    check_numbers(whose, {"seed": recipe.seed}, 0, 2**63 - 1, whole=True)
    check_numbers(whose, {"steps": recipe.steps, "warmup": recipe.warmup}, 1, whole=True)
    check_numbers(whose, {"worlds": recipe.worlds}, 2, whole=True)  # clips are told apart
    check_numbers(whose, {"lr": recipe.lr}, 0, above=True)
    check_numbers(whose, {"weight_decay": recipe.weight_decay}, 0)


def pretrain_encoder(
    options: PretrainEncoderOptions,
    logger: Logger | Sequence[Logger] | bool | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> Path:
    """Train, or go on from the last checkpoint in ``out``; returns the weights file.

    Args:
        options: What to train, and where.
        logger: Of Lightning, instead of those in the options.
        callbacks: Of Lightning, beside those in the options and the run's own.

    Raises:
        ValueError: Settings that train nothing, ``out`` holds another run, or the training has come
            to nothing.
    """
    check_recipe(options.recipe)
    trainer, described = prepare_training("The panorama encoder", options, logger, callbacks)
    task = PretrainEncoder(options.recipe)
    train(task, trainer, options.out, described)
    target = options.out / "panorama_encoder.safetensors"
    write(target, task, described)
    return target


def write(target: Path, task: PretrainEncoder, recipe: str) -> None:
    """Write the network, float16, and where it comes from."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in task.network.state_dict().items()
    }
    last = task.recipe.steps * task.recipe.worlds + FIRST_WORLD - 1
    metadata = {
        "recipe": recipe,
        "steps": str(task.recipe.steps),
        "final_losses": json.dumps(task.losses),
        "world_seeds": f"{FIRST_WORLD} to {last}",
        "commit": commit(),
        "license": "Apache-2.0",
        "comparable": "false",
        "reproduce": "lightning-kv pretrain-encoder -c configs/pretrain_encoder.yaml",
    }
    write_atomic(target, ordered(save(tensors, metadata)))


def ordered(file: bytes) -> bytes:
    """A safetensors file with its metadata in order: equal contents give equal bytes."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + file[start:]
