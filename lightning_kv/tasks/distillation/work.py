"""What a distillation would take: rollouts, labels, bytes, fits and hours, without any weights.

Floating-point operations (FLOP) are counted as in :mod:`lightning_kv.tasks.calibration.work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lightning_kv.models.wan import WanConfig
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES
from lightning_kv.tasks.calibration.work import Passes, flop_words, time_words
from lightning_kv.tasks.options import DistillRecipe
from lightning_kv.utilities.formatting import format_bytes, several

CPU_FACTOR = 2.5
"""How many times longer a rollout takes on the embedded model that is watched, and whose labels are
made, than its passes alone: measured."""
STUDENTS = {"linear": 100.0, "mlp": 30e3, "set": 130e3}
"""FLOP of a step for each place of a list, forwards and backwards, about."""
FIT_RATE = {"linear": 5e8, "mlp": 8e9, "set": 1.4e10}
"""FLOP per second of a fit on one core, measured: what is small waits for memory."""
LOSS = 3e3  # FLOP of the losses for each place


@dataclass(frozen=True)
class DistillWork:
    """What a distillation would take.

    Args:
        config: Of the model.
        latent_size: Latent height and width.
        frames: Latent frames of a clip.
        context: Given frames of it.
        prompts: Number of prompts.
        samples: Clips of each.
        validate: Held-out prompts of these.
        rounds: On-policy rounds after the first.
        budgets: History frames per head.
        outputs: Queries whose outputs go along with a list; 0 for none.
        shadow: Labels come from a full cache on the clip's own latents.
        videos: Clips are real videos.
        student: Its kind.
        recipe: Of each fit.
        controls: A linear student is fitted too.
        ranks: Number of processes.
        rate: FLOP per second of a process.
        factor: How many times longer a watched rollout takes than its passes.
    """

    config: WanConfig
    latent_size: tuple[int, int]
    frames: int
    context: int
    prompts: int
    samples: int
    validate: int
    rounds: int
    budgets: tuple[int, ...]
    outputs: int
    shadow: bool
    videos: bool
    student: str
    ranks: int
    rate: float
    factor: float = 1.0
    controls: bool = True
    recipe: DistillRecipe = field(default_factory=DistillRecipe)

    @property
    def chunks(self) -> int:
        """Of a clip."""
        return -(-self.frames // self.config.chunk)

    @property
    def clips(self) -> list[int]:
        """Of each round; last come held-out clips alone, on which the last scorer is judged."""
        last = [self.validate * self.samples] if self.validate else []
        return [self.prompts * self.samples] * (self.rounds + 1) + last

    def passes(self, held: float | None, clean: bool) -> float:
        """FLOP of all passes over a clip.

        Args:
            held: Frames of history that heads hold at most; all where None.
            clean: Each chunk goes through once, as it is.
        """
        of, chunk = self.config, self.config.chunk
        passes = Passes(of, self.latent_size)
        branches = of.geometry(self.latent_size).branches
        total = 0.0
        for n in range(self.chunks):
            given = clean or (n + 1) * chunk <= self.context
            keys = min(n * chunk, self.frames if held is None else held) + chunk
            each = branches if given else of.passes * branches
            total += each * passes.forward(chunk, round(keys))
        return total

    @property
    def clip(self) -> dict[str, float]:
        """FLOP of a clip, by what is done."""
        held = fmean(self.budgets)
        if self.videos:
            return {"rollouts": self.passes(held, True), "labels": self.passes(None, True)}
        rollouts = self.passes(held, False) + self.passes(None, False)
        return {"rollouts": rollouts, "labels": self.passes(None, True) if self.shadow else 0.0}

    @property
    def lists(self) -> int:
        """Decisions of a clip, mean over budgets: a head at a commit that must drop something."""
        of = self.config
        commits = [
            sum((n + 1) * of.chunk > own for n in range(self.chunks - 1)) for own in self.budgets
        ]
        return round(fmean(commits) * of.layers * of.heads)

    @property
    def places(self) -> float:
        """Frames of a list, mean over budgets."""
        return fmean(self.budgets)

    @property
    def record(self) -> int:
        """Bytes of the record of a clip, float32."""
        each = self.places * (len(FEATURES) + 1.25) + len(CONTEXT) + 8
        each += self.outputs * ((self.places + 1) ** 2 + self.places + 2)
        return round(4 * self.lists * each)

    @property
    def fits(self) -> list[str]:
        """Students that are fitted, one after the other."""
        own = [self.student] * (self.rounds + 1)
        return own + ["linear"] * (self.controls and self.student != "linear")

    def fitting(self, student: str) -> float:
        """FLOP of one fit."""
        recipe = self.recipe
        return recipe.steps * recipe.batch * self.places * (STUDENTS[student] + LOSS)

    @property
    def flops(self) -> dict[str, float]:
        """Of all that is done."""
        each = {name: sum(self.clips) * own for name, own in self.clip.items()}
        return each | {"fits": sum(map(self.fitting, self.fits))}

    @property
    def hours(self) -> dict[str, float]:
        """Until the first rank, which has most to do, has collected all, and of the fits."""
        mine = sum(-(-own // self.ranks) for own in self.clips)
        each = sum(self.clip.values()) * self.factor
        fits = sum(self.fitting(own) / FIT_RATE[own] for own in self.fits)
        return {"collecting": mine * each / self.rate / 3600, "fitting": fits / 3600}

    def words(self, what: str) -> Sequence[str]:
        """All of it in lines.

        Args:
            what: How the rate is known.
        """
        hours, size = self.hours, self.record
        train = (self.prompts - self.validate) * self.samples * (self.rounds + 1)
        processes = "process" if self.ranks == 1 else "processes"
        return [
            f"Clips: {sum(self.clips)} ({several(self.prompts, 'prompt')}, {self.validate} of them "
            f"held out; {several(self.rounds + 1, 'round')}"
            + (", and held-out clips once more" if self.validate else "")
            + f") on {self.ranks} {processes}.",
            f"A clip: {self._rollouts()}; about {self.lists} decisions among {self.places:.3g} "
            "frames.",
            f"Arithmetic: {flop_words(sum(self.flops.values()))} in all; "
            + "; ".join(f"{n} {flop_words(own)}" for n, own in self.flops.items() if own)
            + ".",
            f"Disk: {format_bytes(size)} a clip, {format_bytes(size * sum(self.clips))} in all. A "
            f"fit holds up to {format_bytes(size * train)}.",
            f"Fits: {len(self.fits)} of {self.recipe.steps} steps with {self.recipe.batch} lists, "
            f"about {time_words(hours['fitting'])} in all on one core.",
            f"Time: about {time_words(sum(hours.values()))} with rollouts at "
            f"{flop_words(self.rate)} a second and process ({what}).",
        ]

    def _rollouts(self) -> str:
        if self.videos:
            return "its chunks go through the model twice, clean"
        more = ", and its chunks once more, clean" if self.shadow else ""
        return f"the reference rollout and one that is watched{more}"
