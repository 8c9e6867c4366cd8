"""Networks that rank the frames of a head; untrained, each of them is a policy that is known.

Shapes: N lists (one head at one commit each), U places of a list (candidate frames, and padding),
K features of a frame, C numbers of the whole list, L layers, H heads of a layer, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kv.policies.statistics import standardised
from lightning_kv.utilities.nearest import unknown

EMBEDDING = 8  # width of what is learned of a layer, and of a head


class Student(nn.Module):
    """Scores of the frames of a list: a prior that is linear, plus what a network adds.

    The prior is a product with the features standardised over the candidates of each list, so it
    ranks as a hand-made policy does. The network begins at 0: the untrained student is the prior.

    Args:
        features: Columns K.
        context: Columns C.
        layers: Of the model that it is taught on.
        heads: Of a layer.
        embeddings: Whether it knows which layer and head a list is of; without, it can be tried on
            a model of any size.
        prior: Weight of each standardised feature at the start.

    Attributes:
        settings: What :func:`make_student` builds it from again, untrained; plain numbers.

    Raises:
        ValueError: The prior is not one number for each feature.
    """

    kind: ClassVar[str]

    feature_mean: Tensor
    feature_std: Tensor
    context_mean: Tensor
    context_std: Tensor

    def __init__(
        self,
        features: int,
        context: int,
        layers: int,
        heads: int,
        embeddings: bool,
        prior: Tensor | Sequence[float],
    ) -> None:
        super().__init__()
        start = torch.as_tensor(prior, dtype=torch.float32).detach().clone()
        if start.shape != (features,):
            raise ValueError(
                f"The prior of a student is one weight for each of its {features} features, and "
                f"was given as {tuple(start.shape)}. Give {features} numbers, 0 where a feature "
                "has no part in it."
            )
        self.settings: dict[str, Any] = {
            "kind": self.kind,
            "features": features,
            "context": context,
            "layers": layers,
            "heads": heads,
            "embeddings": embeddings,
            "prior": start.tolist(),
        }
        self.layers, self.heads, self.embeddings = layers, heads, embeddings
        self.prior = nn.Parameter(start)
        for name, count in (("feature", features), ("context", context)):
            self.register_buffer(f"{name}_mean", torch.zeros(count))
            self.register_buffer(f"{name}_std", torch.ones(count))

    def standardise_by(
        self, feature_mean: Tensor, feature_std: Tensor, context_mean: Tensor, context_std: Tensor
    ) -> None:
        """Take the mean and deviation of every column from the lists that it will be taught on.

        Args:
            feature_mean: ``[K]``.
            feature_std: ``[K]``; a column with 0 is only centred.
            context_mean: ``[C]``.
            context_std: ``[C]``.
        """
        self.feature_mean.copy_(feature_mean)
        self.feature_std.copy_(feature_std)
        self.context_mean.copy_(context_mean)
        self.context_std.copy_(context_std)

    def forward(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> Tensor:
        """Scores ``[N, U]``: higher stays longer; minus infinity where there is no candidate.

        Args:
            features: ``[N, U, K]``, as they were measured; whatever stands at other places than
                candidates changes nothing.
            context: ``[N, C]``.
            layer: int64 ``[N]``.
            head: int64 ``[N]``.
            candidate: bool ``[N, U]``.
        """
        prior, residual = self.parts(features, context, layer, head, candidate)
        return (prior + residual).masked_fill(~candidate, -torch.inf)

    def parts(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the prior says and what the network adds, ``[N, U]`` each; 0 off candidates.

        Raises:
            ValueError: The columns are not those that it was made for.
        """
        given, own = (
            (features.shape[-1], context.shape[-1]),
            (len(self.prior), self.context_columns),
        )
        if given != own:
            raise ValueError(
                f"This student takes {own[0]} features of a frame and {own[1]} of a list, and was "
                f"given {given[0]} and {given[1]}. Give it the columns it was taught on."
            )
        absent = ~candidate
        with torch.autocast(features.device.type, enabled=False):  # ranks must not be rounded
            features = features.float().masked_fill(absent.unsqueeze(-1), 0.0)
            columns = features.transpose(1, 2)  # [N, K, U]
            prior = self.prior @ standardised(columns, candidate.unsqueeze(1))
            features = (features - self.feature_mean) / _usable(self.feature_std)
            context = (context.float() - self.context_mean) / _usable(self.context_std)
            residual = self.residual(features, context, layer, head, candidate)
        return prior.masked_fill(absent, 0.0), residual.masked_fill(absent, 0.0)

    @property
    def context_columns(self) -> int:
        """C."""
        return len(self.context_mean)

    def residual(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> Tensor:
        """What the network adds, ``[N, U]``, from standardised columns; 0 before it is taught."""
        raise NotImplementedError


def _usable(deviation: Tensor) -> Tensor:
    return torch.where(deviation > 0, deviation, 1.0)


class LinearStudent(Student):
    """One weight for each feature, and a bias, for each head of each layer.

    The context cannot change the order within a list, so it is left out.
    """

    kind = "linear"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        lines = self.layers * self.heads if self.embeddings else 1
        self.weight = nn.Parameter(torch.zeros(lines, len(self.prior)))
        self.bias = nn.Parameter(torch.zeros(lines))

    def residual(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> Tensor:
        """See :class:`Student`."""
        line = layer * self.heads + head if self.embeddings else torch.zeros_like(layer)
        return torch.einsum("nuk,nk->nu", features, self.weight[line]) + self.bias[line, None]


class _Joint(Student):
    """What students share that see a frame, its list, and whose it is, side by side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.width = len(self.prior) + self.context_columns
        if self.embeddings:
            self.width += 2 * EMBEDDING
            self.layer_embedding = nn.Embedding(self.layers, EMBEDDING)
            self.head_embedding = nn.Embedding(self.layers * self.heads, EMBEDDING)
            nn.init.zeros_(self.layer_embedding.weight)  # all heads begin alike
            nn.init.zeros_(self.head_embedding.weight)

    def joined(self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor) -> Tensor:
        """All that is known of each place, ``[N, U, width]``."""
        whole = [context]
        if self.embeddings:
            whole.append(self.layer_embedding(layer))
            whole.append(self.head_embedding(layer * self.heads + head))
        line = torch.cat(whole, -1).unsqueeze(1)
        return torch.cat([features, line.expand(-1, features.shape[1], -1)], -1)


class MLPStudent(_Joint):
    """Two hidden layers, shared by all heads, that see each frame by itself."""

    kind = "mlp"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.net = nn.Sequential(
            nn.Linear(self.width, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), _silent(32)
        )

    def residual(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> Tensor:
        """See :class:`Student`."""
        return self.net(self.joined(features, context, layer, head)).squeeze(-1)


class SetStudent(_Joint):
    """Two blocks of attention over the candidates of a list, which see what says the same.

    The order in which a list is given changes nothing: scores move with their frames.
    """

    kind = "set"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embed = nn.Linear(self.width, 32)
        self.blocks = nn.ModuleList(_Block(32, heads=2, hidden=64) for _ in range(2))
        self.out = nn.Sequential(nn.LayerNorm(32), _silent(32))

    def residual(
        self, features: Tensor, context: Tensor, layer: Tensor, head: Tensor, candidate: Tensor
    ) -> Tensor:
        """See :class:`Student`."""
        x = self.embed(self.joined(features, context, layer, head))
        itself = torch.eye(candidate.shape[1], dtype=torch.bool, device=candidate.device)
        seen = (candidate.unsqueeze(1) | itself).unsqueeze(1)  # or a softmax over nothing is NaN
        for block in self.blocks:
            x = block(x, seen)
        return self.out(x).squeeze(-1)


class _Block(nn.Module):
    """Attention among the places of a list, then a network at each place, both after a norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Of ``[N, U, W]``; ``seen`` is bool ``[N, 1, U, U]``, who is seen by whom."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, U, W / heads]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.mix(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _silent(width: int) -> nn.Linear:
    """A last layer that says 0 until it is taught."""
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last


STUDENTS: dict[str, type[Student]] = {
    own.kind: own for own in (LinearStudent, MLPStudent, SetStudent)
}


def make_student(
    kind: str,
    *,
    features: int,
    context: int,
    layers: int,
    heads: int,
    embeddings: bool = True,
    prior: Tensor | Sequence[float],
) -> Student:
    """An untrained student, which ranks as its prior does.

    Args:
        kind: ``linear``, ``mlp`` or ``set``.
        features: See :class:`Student`.
        context: See there.
        layers: See there.
        heads: See there.
        embeddings: See there.
        prior: See there.

    Raises:
        ValueError: There is no such kind, or the prior does not fit.
    """
    if kind not in STUDENTS:
        raise ValueError(unknown("student", kind, STUDENTS))
    return STUDENTS[kind](features, context, layers, heads, embeddings, prior)
