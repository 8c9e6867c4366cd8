"""What a policy loses inside attention: what it reads, against all that was ever committed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.cache.plan import bias_of
from lightning_kv.cache.table import BLOCK
from lightning_kv.cache.view import PassView

Tell = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], None]
"""``(lse_read [H, Q], lse_full [H, Q], out [H, Q, D], out_full [H, Q, D], layer, step, chunk)``."""

NAMES = ("retained_mass", "attention_error")


class AttentionProbe:
    """Watches a session (``rollout(..., watch=AttentionProbe([3]))`` for the last of four steps).

    It remembers every row as it was committed first, and so knows full attention: over all rows
    that this rollout has committed, at their own times and as computed, and over the rows in
    flight. Some queries of some denoising passes are asked, those of the frames that become final
    next, and for every head and query two numbers come back, in float64:

    * ``retained_mass``: ``exp(LSE_read - LSE_full)``, the share of full attention's softmax mass
      on the rows that the policy read. Where a policy moves rows in time, merges them or encodes
      them again it is no share any more but a ratio of two softmax denominators; it may then
      exceed 1 and is given as it is.
    * ``attention_error``: ``|o - o_full| / |o_full|`` of the head's output, which includes the
      rounding of the model's dtype. NaN where both outputs are 0.

    Only the ``cond`` namespace is watched. A rebuild is not: full attention goes on with the rows
    as they were before it.

    Args:
        steps: Denoising steps to ask about, counted from 0. With several chunks in flight each
            comes to be the oldest only at the last one.
        tokens: Queries of each frame, spread evenly over its rows and columns; all at most.
        stride: Every so many layers are watched, from the first. The rows of a watched layer are
            held as long as the probe, beside the policy's own memory.
        tell: Told of every pass of every layer that is asked about; see
            :func:`lightning_kv.metrics.functional.retained_mass` for what to make of it.

    Raises:
        ValueError: No steps, or ``tokens`` or ``stride`` below 1.
    """

    def __init__(
        self, steps: Collection[int], tokens: int = 16, stride: int = 1, tell: Tell | None = None
    ) -> None:
        if not steps or min(steps) < 0 or tokens < 1 or stride < 1:
            raise ValueError(
                f"A probe with steps={list(steps)}, tokens={tokens} and stride={stride} measures "
                "nothing. Give steps from 0, and tokens and stride of 1 or more."
            )
        self.steps, self.tokens, self.stride, self.tell = frozenset(steps), tokens, stride, tell
        self._shadow: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._seen: dict[tuple[int, int, int], list[Tensor]] = defaultdict(list)
        self._frames = 0

    def __call__(self, view: PassView) -> None:
        """Note one pass of one layer."""
        step, sample = view.step, view.sample
        if step.namespace != CONDITIONAL or step.rebuild or view.layer % self.stride:
            return
        self._frames = max(self._frames, step.frames[-1] + 1)
        if step.phase == "denoise" and step.step in self.steps:
            self._measure(sample, view)
        if step.final:
            self._remember(sample, view)

    def curves(self, sample: int) -> dict[str, Tensor]:
        """Numbers of every frame of one sample, float64 ``[F]`` on the CPU.

        NaN in frames that were not asked about, such as those of the context.

        Returns:
            ``retained_mass`` and ``attention_error``: means over layers, heads, steps and queries.
            ``retained_mass_p05`` and ``attention_error_p95``: what the worst 5 % of all heads of
            all layers fall short of or exceed.
        """
        mass, error = self._table(sample).flatten(2)
        return {
            "retained_mass": mass.mean(1),
            "attention_error": error.mean(1),
            "retained_mass_p05": mass.quantile(0.05, dim=1),
            "attention_error_p95": error.quantile(0.95, dim=1),
        }

    def heads(self, sample: int) -> dict[str, Tensor]:
        """``retained_mass`` and ``attention_error`` of every watched layer and head, ``[L, H]``.

        Means over frames, steps and queries, float64 on the CPU.
        """
        asked = sorted({frame for owner, _, frame in self._seen if owner == sample})
        return dict(zip(NAMES, self._table(sample)[:, asked].mean(1), strict=True))

    # -- inside ----------------------------------------------------------------------------

    def _table(self, sample: int) -> Tensor:
        """Mass and error ``[2, F, L, H]``, means over steps; NaN in frames not asked about."""
        own = {key[1:]: seen for key, seen in self._seen.items() if key[0] == sample}
        if not own:
            raise ValueError(
                f"No pass of sample {sample} was measured at steps {sorted(self.steps)}. Ask for a "
                "sample of the rollout that was watched, and for steps that its sampler takes."
            )
        layers = sorted({layer for layer, _ in own})
        heads = next(iter(own.values()))[0].shape[1]
        found = torch.full((2, self._frames, len(layers), heads), torch.nan, dtype=torch.float64)
        for (layer, frame), seen in own.items():
            found[:, frame, layers.index(layer)] = torch.stack(seen).mean(0).cpu()
        return found

    def _remember(self, sample: int, view: PassView) -> None:
        k, v = (x[:, view.final] for x in _flight(view))
        blocks = self._shadow[sample, view.layer]
        if blocks and blocks[-1][0].shape[1] + k.shape[1] <= _rows(k):  # few large blocks are fast
            past = blocks.pop()
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        blocks.append((k, v))

    def _measure(self, sample: int, view: PassView) -> None:
        step, tokens = view.step, view.geometry.tokens
        past = self._shadow[sample, view.layer]
        seen = sum(k.shape[1] for k, _ in past)
        if seen != step.start * tokens:
            raise ValueError(
                f"The probe has seen {seen} rows become final in layer {view.layer}, where "
                f"{step.start} frames of {tokens} are past. Let a fresh probe watch each rollout, "
                "from its first pass on."
            )
        # of several chunks in flight the oldest, the least noisy, is the one that counts
        frames = step.frames[: sum(t == step.timesteps[0] for t in step.timesteps)]
        place = self._places(view)
        index = (torch.arange(len(frames)).unsqueeze(1) * tokens + place).flatten()
        index = index.to(view.query.device)
        query, out = view.query[:, index].double(), view.output[:, index].double()
        lse_read = _read(view, query, index)
        lse_full, out_full = _full(query, [*past, _flight(view)])
        if self.tell is not None:
            self.tell(lse_read, lse_full, out, out_full, view.layer, step.step, step.chunk)
        mass = (lse_read - lse_full).exp()
        error = (out - out_full).norm(dim=-1) / out_full.norm(dim=-1)
        means = torch.stack([mass, error]).unflatten(-1, (len(frames), -1)).mean(-1)  # [2, H, f]
        for frame, values in zip(frames, means.unbind(-1), strict=True):
            self._seen[sample, view.layer, frame].append(values)

    def _places(self, view: PassView) -> Tensor:
        """Tokens of a frame whose queries are asked: points of a Sobol sequence on its grid."""
        rows, columns = view.geometry.grid
        if self.tokens >= rows * columns:
            return torch.arange(rows * columns)
        points = torch.quasirandom.SobolEngine(2).draw(self.tokens, dtype=torch.float64)
        row, column = (points * torch.tensor([rows, columns])).long().unbind(-1)
        return (row * columns + column).unique()


def _flight(view: PassView) -> tuple[Tensor, Tensor]:
    """Keys as rotated in this pass and values of the rows in flight, each ``[H, P, D]``."""
    return view.own_keys(), view.own_values()


def _rows(keys: Tensor) -> int:
    """Rows that are widened to float64 at once."""
    return max(1, BLOCK // (keys.shape[0] * keys.shape[2]))


def _logits(query: Tensor, keys: Tensor) -> Tensor:
    return query @ keys.double().transpose(1, 2) / keys.shape[-1] ** 0.5


def _full(query: Tensor, blocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp ``[H, Q]`` and output ``[H, Q, D]`` of attention to all blocks together."""
    lse, out = query.new_full(query.shape[:2], -torch.inf), torch.zeros_like(query)
    for k, v in blocks:
        logits = _logits(query, k)
        total = torch.logaddexp(lse, logits.logsumexp(-1))
        share = (logits - total.unsqueeze(-1)).exp()
        out = out * (lse - total).exp().unsqueeze(-1) + share @ v.double()
        lse = total
    return lse, out


def _read(view: PassView, query: Tensor, index: Tensor) -> Tensor:
    """Log-sum-exp ``[H, Q]`` over the rows that the policy read, as it read them."""
    parts, low = [], 0
    bias = bias_of(view.selection, view)
    for keys, mask in zip((view.keys("read"), view.own_keys()), view.read, strict=True):
        held = low == 0 and keys.shape[1] == len(view) and view.ragged
        for start in range(0, keys.shape[1], _rows(keys)):
            rows = slice(start, min(start + _rows(keys), keys.shape[1]))
            logits = _logits(query, keys[:, rows])
            if bias is not None:
                here = slice(low + rows.start, low + rows.stop)
                logits = logits + _of(bias[..., here], index, view)
            if mask is not None:
                logits = logits.masked_fill(~_of(mask[..., rows], index, view), -torch.inf)
            elif held:
                logits = logits.masked_fill(~view.valid[:, rows].unsqueeze(1), -torch.inf)
            parts.append(logits.logsumexp(-1))
        low += keys.shape[1]
    return torch.stack(parts).logsumexp(0)


def _of(per_block: Tensor, index: Tensor, view: PassView) -> Tensor:
    """What holds for the blocks of queries, ``[1 or H, Q, N]``, for single queries."""
    return per_block[:, index // (view.query.shape[1] // per_block.shape[1])]
