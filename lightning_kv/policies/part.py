"""What all parts of a policy have in common, and what a budget says."""

from __future__ import annotations

import re
import sys
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.budgets import Amount

if TYPE_CHECKING:
    from lightning_kv.policies.base import CachePolicy
    from lightning_kv.policies.cache_spec import CacheSpec

KINDS = ("retain", "select", "budget", "positions", "precision")
State = dict[Any, Any]

PARTS: dict[str, dict[str, type[Part]]] = {kind: {} for kind in KINDS}
"""Parts that have been imported, by kind and name; :func:`registry.discover` imports all."""

NAME = re.compile(r"\w[\w.-]*")

SHARED = "everything"
"""The one name that two parts have: to keep all and to read all are the full cache both."""

PRESETS: dict[str, tuple[Preset, type[Part]]] = {}
"""Published methods that have been imported, each with the part that declares it."""


@dataclass(frozen=True)
class Preset:
    """A published method: a name for one choice of parts, declared by its main part.

    Args:
        name: What people type.
        about: What it keeps, drops and merges, in a sentence.
        paper: Where it was published: title or model, and arXiv id.
        saves: ``memory``, ``reads`` or both; what :mod:`lightning_kv.testing` holds it to.
        parts: What differs from the full cache, as in a policy file.
        defaults: The paper's own setting, in this package's words: budgets are history frames, the
            current chunk left out.
    """

    name: str
    about: str
    paper: str = ""
    saves: tuple[str, ...] = ()
    parts: dict[str, Any] = field(default_factory=dict)
    defaults: str = ""


class Part:
    """One answer. Parts are frozen dataclasses: their ``repr`` is their configuration.

    A class with a ``name`` is known by it once it has been imported; so are its ``presets``.

    A part keeps nothing between calls; what it must remember lies in the dictionary that
    :meth:`fresh` makes, for each rollout, sample and deciding branch, shared by all layers. Its
    tensors and modules count as cache bytes.

    A part may also have ``on_prediction(step, timestep, x0, state)`` and ``on_final(x0, state)``,
    which are shown the clean estimates ``[F, C, h, w]`` of a pass and the latents that stay. With
    ``probed(steps)``, the index of one of so many denoising steps, it is shown an estimate of given
    frames too, at that noise level: a scratch pass for each chunk but the first.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    columns: ClassVar[dict[str, str]] = {}
    """Numbers kept for every row, with what becomes of them in a sum: sum, mean, max or keep."""
    observes: ClassVar[tuple[str, ...]] = ()
    """Passes shown to :meth:`observe`: prefill, denoise, commit, rebuild."""
    presets: ClassVar[tuple[Preset, ...]] = ()
    """Published methods of which this is the main part."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            _claim(cls, cls.name)
            PARTS[cls.kind][cls.name] = cls
        for own in cls.__dict__.get("presets", ()):
            _claim(cls, own.name)
            PRESETS[own.name] = own, cls

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Tables that the caller must bring for this part (``view.tables``), with settings."""
        return {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Side inputs by frame that the rollout must bring (``view.inputs``), such as ``pose``."""
        return ()

    def fresh(self) -> State:
        """State of one sample in one rollout."""
        return {}

    def suits(self, policy: CachePolicy) -> None:
        """Refuse a policy whose bias or other parts contradict this part (``checks.same``)."""
        return

    def observe(self, view: PassView, state: State) -> None:
        """Look at a pass of one layer, once it has attended."""
        return

    def event(self, event: Event, views: list[CacheView], state: State) -> Any:
        """Something happens between two chunks; only the retain part's answer counts."""
        return None


class NameTaken(ValueError):
    """Two parts, or published methods of two parts, want one name.

    Args:
        name: Which.
        text: What is wrong, what was given and what would work.
        owner: The part that has it.
    """

    def __init__(self, name: str, text: str, owner: type[Part]) -> None:
        super().__init__(text)
        self.name, self.owner = name, owner


def _origin(cls: type[Part]) -> tuple[Any, str]:
    """The file that defines a class, and its name there."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) or cls.__module__, cls.__qualname__


def _claim(cls: type[Part], name: str) -> None:
    """Refuse a name that nobody could type, or that is taken.

    Parts of all kinds and published methods share one set of names, and a method may be called
    like the part that declares it. The same class may be defined again: in a notebook, or by a
    script that is imported too.
    """
    mine = f"{cls.__module__}:{cls.__qualname__}"
    if cls.kind not in PARTS or not NAME.fullmatch(name) or name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"{name!r} cannot be the name of a policy or part. {mine} wants it. Use letters, "
            "digits, dots, - and _, in a class of one of the five kinds."
        )
    owners = [own[name] for own in PARTS.values() if name in own]
    owners += [PRESETS[name][1]] if name in PRESETS else []
    for owner in owners:
        theirs = f"{owner.__module__}:{owner.__qualname__}"
        if theirs != mine and _origin(owner) != _origin(cls) and name != SHARED:
            raise NameTaken(
                name,
                f"The name {name!r} is taken. {mine} wants it, and {theirs} has it. Give yours "
                "another name.",
                owner,
            )


@dataclass(frozen=True)
class BudgetPart(Part, ABC):
    """How many frames each head may keep or read.

    Args:
        amount: History frames, the protected ones included: ``9f``, ``9360t`` (tokens), ``0.25``
            (of the history the reference holds), ``2GiB`` (whole cache of one clip).
    """

    kind: ClassVar[str] = "budget"
    compares: ClassVar[bool] = False
    """Whether it compares scores of different heads."""
    amount: str = "9f"

    @property
    def gathers(self) -> bool:
        """Whether it needs the scores of all layers at once, which only a commit has."""
        return False

    def __post_init__(self) -> None:
        Amount.parse(self.amount)

    def of(self, part: Part) -> BudgetPart:
        """The same for the retain or select part that it belongs to; told when a policy is made."""
        return self

    def frames(self, view: CacheView) -> float:
        """The amount in frames per head, in this pass."""
        return Amount.parse(self.amount).frames(view)

    def check(self, geometry: Geometry, least: int) -> None:
        """Refuse a budget of another model, or below ``least`` frames for some head.

        Raises:
            ValueError: Says which head gets too few.
        """
        return

    def check_cache(self, geometry: Geometry, cache: CacheSpec, history: int) -> None:
        """Refuse a cache that this budget was not made for, where so much history is seen.

        Raises:
            ValueError: Says what differs.
        """
        return

    def allowed(self, view: CacheView) -> tuple[float, ...] | None:
        """Frames of each head (one number: of all), where they do not depend on scores."""
        return None

    def layer_mean(self, view: CacheView) -> float:
        """Frames per head that the heads of a layer share, where lengths depend on scores."""
        return self.frames(view)

    def lengths(
        self,
        views: Sequence[CacheView],
        scores: Sequence[Tensor],
        sizes: Sequence[Tensor],
        protected: Sequence[Tensor],
        state: State,
    ) -> list[Tensor]:
        """Rows of each stream, where they depend on scores, int64 ``[1 or H, 1 or Q]`` per view.

        Args:
            views: Of all layers at a commit, of one layer in a pass.
            scores: ``[1 or H, 1 or Q, U]`` of each.
            sizes: Rows of each unit, int64, alike; 0 where a head has none.
            protected: bool, alike: units that stay whatever their score.
            state: This part's.
        """
        raise ValueError(
            f"The budget part {self.name or type(self).__name__!r} says neither how much is "
            "`allowed` nor what `lengths` scores give. Define one of the two methods."
        )
