"""What callbacks that follow a run need of the Trainer."""

from __future__ import annotations

import lightning as L

from lightning_kv.data.datamodule import PromptDataModule, VideoPairDataModule
from lightning_kv.tasks.clip_module import ClipModule


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
