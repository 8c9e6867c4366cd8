"""What each head loses at each budget, prompt by prompt: a file from which any budget is solved.

A budget is history frames per head, protected ones included, the current chunk not.

Shapes: P prompts, L layers, H heads, Bn budgets of the grid.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import safe_open as open_tensors
from safetensors.torch import save as pack
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.policies.allocation import BY_IMPORTANCE, Heads, Knobs, allocate
from lightning_kv.policies.curve_statistics import each_frame, shrunken, summed_up
from lightning_kv.utilities.files import write_atomic

FORMAT, VERSION = "head-table", 1
METRICS = ("mass", "output", "gn", "exact")
CURVE = "curve"
"""Instead of the name of an importance: the loss at the least budget of the curve itself."""

UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError)

MAKE = "Make one with `lightning-kv calibrate -o heads.safetensors`."


@dataclass(frozen=True, eq=False)
class HeadCurves:
    """Loss against budget for every head of a model, as ``calibrate`` has measured it.

    Args:
        budgets: Ascending whole history frames, from the protected number to the reach. Where the
            reference read no more than that, nothing is lost there. Rules take straight lines
            between them. A curve may rise here and there, for it is noisy.
        curves: By ``SCORER/METRIC``, float64 ``[P, L, H, Bn]``: loss for each prompt, of which an
            expensive metric may have fewer. The scorer says which frames are kept: ``mass``,
            ``recency``, or a scoring part. The metric is ``mass`` (that is lost), ``output`` (error
            of the attention output), ``gn`` (of the clean estimate, by Gauss-Newton probes) or
            ``exact`` (of it, by masking).
        importance: By name, float64 ``[L, H]``.
        extra: Other tensors that are kept and written as they are.
        about: What was measured, how and with what: goes into the file as JSON.
    """

    budgets: tuple[int, ...]
    curves: dict[str, Tensor]
    importance: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid, shapes = self.budgets, {tuple(own.shape[1:]) for own in self.curves.values()}
        rising = all(a < b for a, b in itertools.pairwise(grid))
        wrong = ""
        if not grid or grid[0] < 0 or not rising:
            wrong = f"its budgets {grid} are not ascending whole frames"
        elif len(shapes) != 1 or len(shape := next(iter(shapes))) != 3 or shape[2] != len(grid):
            wrong = f"its curves have the shapes [P, {sorted(shapes)}] for {len(grid)} budgets"
        elif not all(map(len, self.curves.values())):
            wrong = "a curve has no prompts"
        elif any(own.shape != shape[:2] for own in self.importance.values()):
            wrong = f"an importance is not {shape[0]} x {shape[1]}"
        elif not all(own.isfinite().all() for own in (*self.curves.values(), *self.importances)):
            wrong = "some of its numbers are not finite"
        elif unknown := [k for k in self.curves if k.rpartition("/")[2] not in METRICS]:
            wrong = f"{unknown[0]!r} is no SCORER/METRIC with one of {', '.join(METRICS)}"
        if wrong:
            raise ValueError(
                f"These are no head curves: {wrong}. Give [P, L, H, {len(grid)}] finite losses for "
                f"each SCORER/METRIC. {MAKE}"
            )

    @property
    def importances(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        return tuple(self.importance.values())

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers and heads."""
        return tuple(next(iter(self.curves.values())).shape[1:3])

    @property
    def reach(self) -> int:
        """The most history frames that the reference read."""
        return self.budgets[-1]

    @property
    def scorers(self) -> list[str]:
        """What kept frames, of all curves."""
        return sorted({name.partition("/")[0] for name in self.curves})

    def prompts(self, scorer: str, metric: str) -> Tensor:
        """Curves of a scorer by a metric, float64 ``[P, L, H, Bn]``.

        Raises:
            ValueError: They were not measured.
        """
        found = self.curves.get(f"{scorer}/{metric}")
        if found is None:
            raise ValueError(
                f"There are no curves {scorer}/{metric} in this head file. It has "
                f"{', '.join(sorted(self.curves))}. {self._way(scorer, metric)}, or say which of "
                "these is meant (scorer, metric); what a head loses depends on what keeps its "
                "frames."
            )
        return found.double()

    def _way(self, scorer: str, metric: str) -> str:
        """How curves are made that are not here."""
        if metric == "exact":
            return "Measure all exactly (calibrate --exact all, --validate as many as --prompts)"
        return f"Measure again with this scorer (calibrate --scorers {scorer})"

    def curve(
        self, scorer: str, metric: str, objective: str = "mean", shrink: bool = True
    ) -> Tensor:
        """One curve for each head, float64 ``[L, H, Bn]``: over all prompts, shrunk if asked for.

        Raises:
            ValueError: It was not measured, or one prompt is too few to shrink.
        """
        mean, error = summed_up(self.prompts(scorer, metric), objective)
        return shrunken(mean, error) if shrink else mean

    def important(self, name: str, curve: Tensor) -> Tensor:
        """One number for each head, float64 ``[L, H]``.

        Args:
            name: Of an importance, or ``curve``: the first point of the curve.
            curve: ``[L, H, Bn]``.

        Raises:
            ValueError: There is none of this name.
        """
        if name == CURVE:
            return curve[..., 0]
        if name not in self.importance:
            raise ValueError(
                f"There is no importance {name!r} in this head file. It has "
                f"{', '.join(sorted(self.importance)) or 'none'}. Use one of these, or {CURVE} "
                "(the loss at the least budget)."
            )
        return self.importance[name].double()

    def solve(
        self,
        rule: str,
        mean: float,
        scorer: str = "mass",
        metric: str = "gn",
        objective: str = "mean",
        shrink: bool = True,
        importance: str = CURVE,
        least: int | None = None,
        most: int | None = None,
        knobs: Knobs = Knobs(),  # noqa: B008
    ) -> tuple[tuple[int, ...], ...]:
        """Frames of each head, a row per layer.

        Args:
            rule: See :mod:`lightning_kv.policies.allocation`.
            mean: Frames per head on average; of ``focused`` the most.
            scorer: Which frames were kept where it was measured.
            metric: How loss was measured.
            objective: ``mean`` over prompts, or ``cvar``: the worst quarter.
            shrink: Whether noise is taken out of the curves first.
            importance: What the rules by importance look at.
            least: Frames of any head; the first budget of the grid where None.
            most: The last one where None.
            knobs: Settings of the rules.

        Raises:
            ValueError: Something was not measured, or cannot be divided.
        """
        curve = self.curve(scorer, metric, objective, shrink)
        numbers = self.important(importance, curve) if rule in BY_IMPORTANCE else None
        of = limited(self.budgets, curve, numbers, least, most)
        return tuple(map(tuple, allocate(rule, mean, of, knobs).tolist()))

    def save(self, path: str | Path) -> None:
        """Write the file, and what it says about itself beside it as JSON.

        The same curves give the same bytes. Of each curve there are ``prompt/...`` (for each
        prompt), ``curve/...`` (their mean) and, of two prompts or more, ``curve/.../se``.

        Args:
            path: Ends in ``.safetensors``; the JSON has the same name.

        Raises:
            ValueError: It ends otherwise, or an extra tensor has a name of the format's own.
        """
        path, tensors = Path(path), {"grid/budget": torch.tensor(self.budgets, dtype=torch.int32)}
        if path.suffix != ".safetensors":
            raise ValueError(
                f"Head curves cannot be written to {str(path)!r}: what they say about themselves "
                "goes into a .json of the same name. Give a name such as heads.safetensors."
            )
        for key, own in self.curves.items():
            mean, error = summed_up(own)
            tensors |= {f"prompt/{key}": own.double(), f"curve/{key}": mean}
            tensors |= {} if error is None else {f"curve/{key}/se": error}
        tensors |= {f"importance/{name}": own.double() for name, own in self.importance.items()}
        if both := sorted(tensors.keys() & self.extra.keys()):
            raise ValueError(
                f"The extra tensor {both[0]!r} has a name of the format's own. Call it otherwise."
            )
        tensors = {  # copies: views of one tensor may be written, too
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in (tensors | self.extra).items()
        }
        about = {"format": FORMAT, "version": VERSION, **self.about}
        text = json.dumps(about, sort_keys=True, allow_nan=False)
        write_atomic(path, pack(dict(sorted(tensors.items())), {"lightning_kv": text}))
        write_atomic(path.with_suffix(".json"), json.dumps(about, sort_keys=True, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadCurves:
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: No such file, or it is damaged, or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"No head file at {str(path)!r}. {MAKE}")
        try:
            with open_tensors(path, "pt") as file:
                about = json.loads((file.metadata() or {})["lightning_kv"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (about["format"], about["version"]) != (FORMAT, VERSION):
                raise ValueError(f"its format is {about['format']!r} {about['version']}")
            if not isinstance(about.get("model", {}).get("geometry", {}), dict):
                raise ValueError("it does not say of which model it is")
            grid = tuple(found.pop("grid/budget").tolist())
            return cls(grid, *_sorted_out(found), about)
        except UNREADABLE as error:
            lines = str(error).splitlines() or [""]
            what = f"it has no {error}" if isinstance(error, KeyError) else lines[0]
            raise ValueError(
                f"{str(path)!r} ({path.stat().st_size} bytes) cannot be read as a head file: "
                f"{what.removesuffix('.')}. It may be damaged, or of another kind. {MAKE}"
            ) from error


def _sorted_out(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """Curves, importances and everything else of a file, by their own names."""
    curves = {k[7:]: v for k, v in found.items() if k.startswith("prompt/")}
    importance = {k[11:]: v for k, v in found.items() if k.startswith("importance/")}
    rest = {k: v for k, v in found.items() if not k.startswith(("prompt/", "importance/"))}
    derived = {f"curve/{key}{end}" for key in curves for end in ("", "/se")}
    return curves, importance, {k: v for k, v in rest.items() if k not in derived}


def described(geometry: Geometry) -> dict[str, Any]:
    """The sizes of a model as they stand in a file, under ``model`` and ``geometry``."""
    return {
        "layers": geometry.layers,
        "heads": geometry.heads,
        "head_dim": geometry.head_dim,
        "tokens_per_frame": geometry.tokens,
        "grid": list(geometry.grid),
        "frames_per_chunk": geometry.chunk,
    }


def check_shape(
    own: dict[str, Any],
    geometry: Geometry,
    allow: bool = False,
    what: str = "head curves were measured",
) -> None:
    """Refuse curves, or whatever was made for a model, where the model has other sizes.

    Args:
        own: As :func:`described`, of the model that was measured; what is not known is not
            compared.
        geometry: Of the model that will use them.
        allow: Take what was made with another chunk or grid.
        what: What was made, and how.

    Raises:
        ValueError: It has other layers or heads; or, unless allowed, another chunk or grid.
    """
    here = described(geometry)
    if not geometry.chunk:
        del here["frames_per_chunk"]
    other = [key for key, value in here.items() if own.get(key) and own[key] != value]
    if {"layers", "heads", "head_dim"} & set(other):
        raise ValueError(
            f"The {what.rpartition(' ')[0]} made for another model: {own['layers']} layers of "
            f"{own['heads']} heads ({own.get('head_dim', '?')} numbers each). This one has "
            f"{geometry.layers} layers of {geometry.heads} heads ({geometry.head_dim} numbers). "
            "Give those of this model."
        )
    other = [key for key in other if key != "tokens_per_frame"]  # the grid says the same
    if other and not allow:
        words = {"grid": "a token grid of {}", "frames_per_chunk": "chunks of {}"}
        then, now = (
            " and ".join(words[key].format(each[key]) for key in other) for each in (own, here)
        )
        raise ValueError(
            f"The {what} with {then}, and this rollout has {now}. Do that there too, or allow it "
            "(transfer: true)."
        )


def limited(
    budgets: tuple[int, ...],
    curve: Tensor,
    importance: Tensor | None,
    least: int | None,
    most: int | None,
) -> Heads:
    """What a rule may look at, between a least and a most.

    Args:
        budgets: The grid.
        curve: float64 ``[L, H, Bn]``.
        importance: ``[L, H]``.
        least: The first of the grid where None.
        most: The last where None.

    Raises:
        ValueError: A limit is outside of the grid, or they cross.
    """
    low = budgets[0] if least is None else least
    high = budgets[-1] if most is None else most
    if not budgets[0] <= low <= high <= budgets[-1]:
        raise ValueError(
            f"Budgets from {low} to {high} frames were not measured: the curves go from "
            f"{budgets[0]} to {budgets[-1]}. Give limits in between (least, most), or measure "
            "again."
        )
    layers, heads = curve.shape[:2]
    return Heads(layers, heads, low, high, each_frame(budgets, curve, low, high), importance)
