"""A learned scorer in a file: its weights, what it looks at, and what it was taught.

``scorer.safetensors`` holds the weights by name, and as JSON under ``lightning_kv`` everything
else; the same JSON lies beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import safe_open as open_tensors
from safetensors.torch import save as pack
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.policies.head_curves import check_shape
from lightning_kv.policies.scorer.features import CONTEXT, FEATURES, feature_hash
from lightning_kv.policies.scorer.students import Student, make_student
from lightning_kv.utilities.files import checksum, write_atomic
from lightning_kv.utilities.nearest import unknown

FORMAT, VERSION = "scorer", 1
SCORERS = Path(__file__).parents[2] / "weights" / "scorers"
"""Files that are shipped, ``MODEL.safetensors``."""
QUERIES = 64
"""Query rows of a clean pass that look at what is held."""
MAKE = "Make one with `lightning-kv distill -o scorer.safetensors`."
UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError)
PRIORS: dict[str, dict[str, float]] = {
    "h2o": {"total-mass": 1.0},
    "snap-kv": {"last-mass": 1.0},
    "recency": {"age": -1.0},
    "focused": {"logit": 1.0, "novelty": 1.0},
    "future": {"future-near": 1.0, "future-far": 1.0},
}
"""Hand-made policies that a student may begin as: weights of features."""


def prior_of(name: str, features: Sequence[str]) -> list[float]:
    """Weights of the features of a hand-made policy.

    Raises:
        ValueError: No such policy, or one of its features is left out.
    """
    if name not in PRIORS:
        raise ValueError(unknown("prior", name, PRIORS))
    if missing := sorted(PRIORS[name].keys() - set(features)):
        raise ValueError(
            f"A student that begins as {name!r} looks at {', '.join(missing)}, which is left out "
            f"of its features. Keep it, or begin as another of {', '.join(PRIORS)}."
        )
    return [PRIORS[name].get(feature, 0.0) for feature in features]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A student, the features that it looks at, and where it comes from.

    Args:
        student: Ranks the frames of a list.
        features: Names, in order.
        queries: Query rows of a clean pass that look.
        about: Model, cache, teacher, rounds, data and validation: plain data.
    """

    student: Student
    features: tuple[str, ...]
    queries: int = QUERIES
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fresh(
        cls,
        kind: str,
        geometry: Geometry,
        features: Sequence[str] = tuple(FEATURES),
        prior: str = "h2o",
        embeddings: bool = True,
        queries: int = QUERIES,
    ) -> Scorer:
        """An untrained one, which ranks as a hand-made policy does.

        Args:
            kind: linear, mlp or set.
            geometry: Of the model.
            features: Names, see :data:`~lightning_kv.policies.scorer.features.FEATURES`.
            prior: Which policy, see :data:`PRIORS`.
            embeddings: Whether it knows which layer and head a list is of.
            queries: Query rows of a clean pass that look.

        Raises:
            ValueError: A feature, kind or prior is not known.
        """
        for name in features:
            if name not in FEATURES:
                raise ValueError(unknown("feature", name, FEATURES))
        student = make_student(
            kind,
            features=len(features),
            context=len(CONTEXT),
            layers=geometry.layers,
            heads=geometry.heads,
            embeddings=embeddings,
            prior=prior_of(prior, features),
        )
        return cls(student.eval().requires_grad_(False), tuple(features), queries)

    def save(self, path: str | Path) -> None:
        """Write the file, and what it says about itself beside it as JSON; equal bytes if alike.

        Raises:
            ValueError: The name does not end in ``.safetensors``.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"A scorer cannot be written to {str(path)!r}: what it says about itself goes into "
                "a .json of the same name. Give a name such as scorer.safetensors."
            )
        told = {
            **self.about,
            "format": FORMAT,
            "version": VERSION,
            "student": self.student.settings,
            "features": list(self.features),
            "feature_hash": feature_hash(self.features),
            "queries": self.queries,
        }
        tensors = {
            name: own.detach().cpu().float().contiguous()
            for name, own in sorted(self.student.state_dict().items())
        }
        text = json.dumps(told, sort_keys=True, allow_nan=False)
        write_atomic(path, pack(tensors, {"lightning_kv": text}))
        write_atomic(path.with_suffix(".json"), json.dumps(told, sort_keys=True, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Scorer:
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: No such file, it is damaged or of another kind, or its features are defined
                otherwise here.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"No scorer at {str(path)!r}. {MAKE}")
        try:
            with open_tensors(path, "pt") as file:
                about = json.loads((file.metadata() or {})["lightning_kv"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (about["format"], about["version"]) != (FORMAT, VERSION):
                raise ValueError(f"its format is {about['format']!r} {about['version']}")
            features = tuple(about["features"])
            _check_features(path, features, about["feature_hash"])
            student = make_student(**about["student"])
            student.load_state_dict(found)
            if not all(x.isfinite().all() for x in found.values()):
                raise ValueError("some of its weights are not finite")
            student.eval().requires_grad_(False)
            return cls(student, features, about["queries"], about)
        except OtherFeatures:
            raise
        except (*UNREADABLE, RuntimeError) as error:
            lines = str(error).splitlines() or [""]
            what = f"it has no {error}" if isinstance(error, KeyError) else lines[0]
            raise ValueError(
                f"{str(path)!r} ({path.stat().st_size} bytes) cannot be read as a scorer: "
                f"{what.removesuffix('.')}. It may be damaged, or of another kind. {MAKE}"
            ) from error

    @property
    def prompts(self) -> tuple[str, ...]:
        """Keys of the prompts that it was taught on, then of those that said when to stop.

        Nothing is to be judged on any of them: the second chose among students.
        """
        told = self.about.get("data", {})
        return (*told.get("prompts", ()), *told.get("validation_prompts", ()))

    def foreign(self, model: str, weights: str = "") -> str:
        """What to say where it was taught on another model, or on other weights; else nothing.

        Args:
            model: Name of the model that uses it; what is not known is not compared.
            weights: What tells its weights from others.
        """
        told = self.about.get("model", {})
        name, mark = told.get("name", ""), told.get("fingerprint", "")
        if name and model and name != model:
            whose, where = f"on the model {name!r}", f"for {model!r}"
        elif mark and weights and mark != weights:
            whose, where = f"on other weights of {name!r}", "here"
        else:
            return ""
        return (
            f"A scorer that was taught {whose} is used {where}. Whether it fits is an experiment: "
            "distil one for this model to be sure."
        )

    def scores(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> Tensor:
        """Scores ``[N, U]``, see :meth:`~.students.Student.forward`."""
        return self.student(features, context, layer, head, candidate)


class OtherFeatures(ValueError):
    """The features of a file are defined otherwise here."""


def _check_features(path: Path, features: Sequence[str], told: str) -> None:
    """Refuse a file whose features are unknown here, or are something else by now.

    Raises:
        OtherFeatures: They are.
    """
    absent = [name for name in features if name not in FEATURES]
    if absent or feature_hash(features) != told:
        what = f"looks at {', '.join(absent)}" if absent else "was taught on other definitions"
        raise OtherFeatures(
            f"The scorer {str(path)!r} {what}: its features ({told}) are not those of this version"
            f"{'' if absent else f' ({feature_hash(features)})'}. Distil it again, or use the "
            "version that it was made with."
        )


@dataclass(frozen=True)
class ScorerFile:
    """Which scorer a part uses: the file, and its mark.

    Args:
        file: Name of the file, or ``auto``: the one that is shipped for the model.
        sha256: Of the file; of ``auto``, of all that are shipped.
        path: Where it is.
    """

    file: str = "auto"
    sha256: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        mark = _digest() if self.file == "auto" else _mark(self.path)
        if self.sha256 and self.sha256 != mark:
            raise ValueError(
                f"The scorer {self.path or self.file!r} is no longer the file that was meant: its "
                f"SHA-256 is {mark[:12]}, and {self.sha256[:12]} was asked for. Give the file that "
                "was used then, or start anew with this one."
            )
        object.__setattr__(self, "sha256", mark)

    @classmethod
    def of(cls, value: Any) -> ScorerFile:
        """From a path, or from what :func:`dataclasses.asdict` made of one."""
        if isinstance(value, ScorerFile):
            return value
        if isinstance(value, dict) and not value.keys() - set(cls.__dataclass_fields__):
            return cls(**value)
        return cls.read(value, "scorer")

    @classmethod
    def read(cls, path: str | Path, name: str, folder: Path = Path()) -> ScorerFile:
        """From a path.

        Args:
            path: Of the file, or ``auto``.
            name: Of the setting.
            folder: Where the path starts.

        Raises:
            ValueError: No such file.
        """
        if str(path) == "auto":
            return cls()
        return cls(Path(path).name, "", str(folder / path))

    def scorer(self, geometry: Geometry) -> Scorer:
        """What is in it; of ``auto``, in the one for the model.

        Raises:
            ValueError: None is shipped for the model, or the file cannot be read.
        """
        if self.file != "auto":
            return _loaded(self.path, self.sha256)
        return _shipped(geometry.model)


def check_model(scorer: Scorer, geometry: Geometry, transfer: bool) -> str:
    """Refuse a model of other layers or heads; what is to be said of another model, or nothing.

    Features do not depend on the width of a head. A scorer without embeddings knows no heads.

    Raises:
        ValueError: It has other layers or heads; or, unless allowed, another chunk or grid.
    """
    told, student = scorer.about.get("model", {}), scorer.student
    left_out = ("layers", "heads", "head_dim")
    sizes = {k: own for k, own in told.get("geometry", {}).items() if k not in left_out}
    if student.embeddings:
        sizes |= {"layers": student.layers, "heads": student.heads}
    check_shape(sizes, geometry, transfer, "scorer was taught")
    return scorer.foreign(geometry.model)


@lru_cache(maxsize=16)
def _loaded(path: str, sha256: str) -> Scorer:
    ScorerFile(Path(path).name, sha256, path)  # it may have changed since it was named
    with torch.inference_mode(False):  # kept for later
        return Scorer.load(path)


@lru_cache(maxsize=16)
def _shipped(model: str) -> Scorer:
    path = shipped_scorers().get(model)
    if path is None:
        whose = f"the model {model!r}" if model else "a model without a name"
        raise ValueError(
            f"No scorer is shipped for {whose}, and the setting is scorer: auto. {MAKE[:-1]}, "
            "and give its path."
        )
    with torch.inference_mode(False):
        return Scorer.load(path)


@lru_cache(maxsize=64)
def _on(scorer: Scorer, device: torch.device) -> Student:
    with torch.inference_mode(False):
        made = make_student(**scorer.student.settings)
        made.load_state_dict(scorer.student.state_dict())
        return made.to(device).eval().requires_grad_(False)


def student_on(scorer: Scorer, device: torch.device) -> Student:
    """The student on a device: one copy there, whoever asks."""
    return scorer.student if device.type == "cpu" else _on(scorer, device)


def _mark(path: str) -> str:
    try:
        return checksum(Path(path))
    except OSError as error:
        raise ValueError(f"No scorer at {path!r} ({type(error).__name__}). {MAKE}") from error


@cache
def shipped_scorers() -> dict[str, Path]:
    """Scorers that are shipped, by the name of their model."""
    return {path.stem: path for path in sorted(SCORERS.glob("*.safetensors"))}


@cache
def _digest() -> str:
    every = "".join(map(checksum, shipped_scorers().values()))
    return hashlib.sha256(every.encode()).hexdigest()
