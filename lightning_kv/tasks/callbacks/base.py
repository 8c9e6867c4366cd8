"""What callbacks that write about clips have in common, and what they need of the Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import lightning as L

from lightning_kv.data.datamodule import PromptDataModule, VideoPairDataModule
from lightning_kv.runs.directory import RunDirectory, fingerprint
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.measuring.fingerprint import describe


def check_data(trainer: L.Trainer, callback: L.Callback, *needs: str) -> None:
    """Refuse a Trainer that was given dataloaders alone, or another thing than a run.

    Args:
        trainer: Of the callback.
        callback: Who asks.
        needs: What it asks the data module for.

    Raises:
        ValueError: There is no data module or one of another kind, or the module measures no clips.
    """
    name, module, data = type(callback).__name__, trainer.lightning_module, trainer.datamodule
    if not isinstance(module, ClipModule):
        raise ValueError(
            f"{name} writes about clips that are measured, and a {type(module).__name__} measures "
            "none. Use it with EvaluateModule or CompareModule."
        )
    kind = type(module).data_kind
    call = f"Call trainer.test(module, datamodule={kind.__name__}(...))."
    if data is None:
        raise ValueError(
            f"{name} must know what the run is about, and the Trainer was given no data module. "
            f"{call}"
        )
    ours = isinstance(data, PromptDataModule | VideoPairDataModule)
    lacks = [need for need in needs if not hasattr(data, need)]
    if lacks or (ours and not isinstance(data, kind)):
        raise ValueError(
            f"The data module does not fit {type(module).__name__}: {name} asks it for "
            f"{', '.join(lacks) or 'what such a module measures'}, and a {type(data).__name__} was "
            f"given. {call}"
        )


class RunCallback(L.Callback):
    """Writes something about some clips of a run into its directory.

    Args:
        out: Run directory.
    """

    keeps_records = False
    """Whether it looks after the directory: opens it, and refuses that of another run."""

    def __init__(self, out: str | Path) -> None:
        self.run = RunDirectory(out)

    def lacking(self, trainer: L.Trainer, module: ClipModule, keys: Collection[str]) -> set[str]:
        """Of some clips, those of which something is still to be written."""
        return set()


class FirstPromptsCallback(RunCallback):
    """Writes something about the first prompts of a run, their first noise.

    Args:
        out: Run directory.
        prompts: How many; None for all.
    """

    def __init__(self, out: str | Path, prompts: int | None = None) -> None:
        super().__init__(out)
        if prompts is not None and prompts < 0:
            raise ValueError(
                f"--videos {prompts} is no number of prompts. Use 0 for none, or leave it out for "
                "all."
            )
        self.prompts = prompts
        self.keys: Collection[str] = ()
        self.pending: dict[str, dict[str, Any]] = {}

    def pictured(self, trainer: L.Trainer, module: ClipModule) -> Collection[str]:
        """Keys of the clips that something is written about."""
        return frozenset(trainer.datamodule.first(self.prompts))

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        """Know which clips, once the directory is no other run's.

        Raises:
            ValueError: It is.
        """
        if stage != "test":
            return
        check_data(trainer, self, "describe", "first")
        if trainer.is_global_zero and self._holds_run() and not self._recorded(trainer):
            described = describe(trainer, pl_module, trainer.datamodule)
            self.run.open(fingerprint(described), described)
        self.begin(trainer, pl_module)

    def _holds_run(self) -> bool:
        """Whether there is something that could be another run."""
        path = self.run.path
        return (path / "run.json").exists() or (path.exists() and not path.is_dir())

    def _recorded(self, trainer: L.Trainer) -> bool:
        """Whether a writer of records looks after the directory."""
        writers = [each for each in trainer.callbacks if getattr(each, "keeps_records", False)]
        return self.run.path.resolve() in {each.run.path.resolve() for each in writers}

    def begin(self, trainer: L.Trainer, module: ClipModule) -> None:
        """Know which clips."""
        self.keys = self.pictured(trainer, module)
        self.pending.clear()

    def take(self, clips: Iterable[ClipResult]) -> None:
        """Keep what is shown of clips, and write it with the last of their prompt."""
        for index, clip in enumerate(clips):
            if clip.key in self.keys:
                self.pending.setdefault(clip.key, {})[clip.name] = self.shown(clip, index)
                if clip.last:
                    self.write(clip, self.pending.pop(clip.key))

    def shown(self, clip: ClipResult, index: int) -> Any:
        """What is kept of a clip, the one at this place of its batch."""
        raise NotImplementedError

    def write(self, clip: ClipResult, shown: dict[str, Any]) -> None:
        """Write what is shown of all names."""
        raise NotImplementedError

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: ClipModule, outputs: Any, *_: Any
    ) -> None:
        """Take in what was made."""
        self.take(outputs["clips"])
