"""What an evaluation leaves on disk: records, features, latents, moving pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_kv.cache.probe import AttentionProbe
from lightning_kv.metrics import Clip
from lightning_kv.metrics.backbones import Backbone
from lightning_kv.metrics.windows import Windows
from lightning_kv.models.samplers import NOISE_REVISION
from lightning_kv.rollout import Rollout
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.video import Frames
from lightning_kv.tasks.clips import SUFFIX, write_clip
from lightning_kv.tasks.decode import FOLDER
from lightning_kv.tasks.featured import (
    featured,
    part_of_path,
    policy_folder,
    real_folder,
    write_features,
)
from lightning_kv.tasks.film import Rows, film, filmed
from lightning_kv.tasks.options import EvaluateOptions
from lightning_kv.tasks.results import broken, cost, fitted, measure
from lightning_kv.tasks.scenes import Start


class Recorder:
    """Writes what one rank has measured; what an earlier run wrote stays.

    Args:
        run: Where to.
        options: Of the run.
        encoders: What metrics of sets look through, by name.
        given: Leading pixel frames that were not generated.
        rank: Of this process.
    """

    def __init__(
        self,
        run: RunDirectory,
        options: EvaluateOptions,
        encoders: Mapping[str, Backbone],
        given: int,
        rank: int = 0,
    ) -> None:
        self.run, self.options, self.encoders = run, options, encoders
        self.given, self.rank = given, rank
        found = run.records() if run.path.is_dir() else []
        self.there = {(record["policy"], record["key"]) for record in found}
        self.failed = {(r["policy"], r["key"]) for r in found if r.get("failure")}

    def clips(
        self,
        name: str,
        metrics: nn.ModuleDict,
        out: Rollout,
        compared: Rollout | None,
        reference: Rollout,
        starts: list[Start],
        probe: AttentionProbe | None,
    ) -> None:
        """Measure the clips of a batch under one policy.

        Args:
            name: Of the policy.
            metrics: Its own, by name.
            out: Its rollout.
            compared: What metrics compare it with; None for the reference itself.
            reference: What costs are shares of.
            starts: The prompts.
            probe: What watched the rollout's attention.
        """
        for index, start in enumerate(starts):
            if self.options.latents:
                self._keep(name, out.latents[index], start)
            if not broken(out, reference, index):
                self._features(name, start, out, index)
            if (name, start.sample.key) in self.there:
                continue  # finished before this run was taken up again
            record = {
                "policy": name,
                "key": start.sample.key,
                "prompt": start.sample.prompt,
                "noise_revision": NOISE_REVISION,
                "cost": cost(out, reference, index),
            }
            failure = broken(out, reference, index)
            found = {"metrics": dict.fromkeys(metrics), "curves": {}, "failure": failure}
            if not failure:
                clip, problems = self._clip(start, out, compared, index, probe), {}
                found["metrics"], found["curves"] = measure(metrics, clip, problems)
                found |= {"problems": problems} if problems else {}
            self.run.append(self.rank, record | found)

    def _clip(
        self,
        start: Start,
        out: Rollout,
        compared: Rollout | None,
        index: int,
        probe: AttentionProbe | None,
    ) -> Clip:
        return Clip(
            latents=out.latents[index],
            pixels=pixels_of(out, index),
            reference_latents=None if compared is None else compared.latents[index],
            reference_pixels=pixels_of(compared, index),
            context=self.options.context_frames,
            scene=start.scene,
            prompt=start.sample.prompt,
            fps=self.options.fps,
            attention=None if probe is None else probe.curves(index),
        )

    def _features(self, name: str, start: Start, out: Rollout, index: int) -> None:
        """What the encoders make of a clip, and of what its world really shows then."""
        if not self.encoders:
            return
        shown = {policy_folder(self.run, name): pixels_of(out, index)}
        if start.scene is not None and start.scene.has_truth and self.options.real is None:
            shown[real_folder(self.run)] = start.scene.truth_pixels
        for folder, pixels in shown.items():
            if featured(folder, start.sample.key):
                continue
            found = {}
            for encoder in self.encoders.values():
                windows = Windows(encoder, self.given)
                windows.add(pixels)
                found[encoder.name] = windows.features()
            write_features(folder, start.sample.key, found)

    def _keep(self, name: str, latents: Tensor, start: Start) -> None:
        """Latents of one clip, for a later ``lightning-kv decode``."""
        about = {
            "model": self.options.model,
            "policy": name,
            "prompt": start.sample.prompt,
            "key": start.sample.key,
            "seed": str(self.options.seed),
            "noise_revision": str(NOISE_REVISION),
            "precision": self.options.precision,
        }
        path = latents_path(self.run, name, start.sample.key)
        write_clip(path, latents, self.options.fps, about)

    def picture(self, start: Start, clips: dict[str, Frames], reference: str) -> None:
        """The moving pictures of one prompt."""
        rows: Rows = [("world", fitted(start.truth))] if start.truth is not None else []
        rows += list(clips.items())
        film(
            self.run,
            start.sample.key,
            lambda: iter([rows]),
            len(rows[0][1]),
            self.options.fps,
            reference,
        )

    def finished(self, policies: Collection[str], pictured: Collection[str]) -> set[str]:
        """Keys of the prompts of which nothing is left to do."""
        options, done = self.options, self.run.finished(policies)
        traced = {path.stem for path in self.run.traces.glob("*.npz")}
        return {
            key
            for key in done
            if (key not in pictured or key in traced)
            and (key not in pictured or not options.decode or filmed(self.run, key))
            and (not options.latents or kept(self.run, policies, key))
            and (not self.encoders or self._featured(policies, key))
        }

    def _featured(self, policies: Collection[str], key: str) -> bool:
        """Whether the features of a prompt are there, of all clips that did not fail."""
        whole = [name for name in policies if (name, key) not in self.failed]
        folders = [policy_folder(self.run, name) for name in whole]
        if whole and self.given and self.options.real is None:  # only a world is given frames
            folders.append(real_folder(self.run))
        return all(featured(folder, key) for folder in folders)


def pixels_of(out: Rollout | None, index: int) -> Tensor | None:
    """Pixels of one clip, where there are any."""
    return None if out is None or out.frames is None else out.frames[index]


def latents_path(run: RunDirectory, policy: str, key: str) -> Path:
    """Where the latents of a clip are kept."""
    return run.path / FOLDER / part_of_path(policy) / f"{key}{SUFFIX}"


def kept(run: RunDirectory, policies: Collection[str], key: str) -> bool:
    """Whether the latents of a prompt are there for every policy."""
    return all(latents_path(run, policy, key).is_file() for policy in policies)
