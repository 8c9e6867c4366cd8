"""How many bits a number of a key or value takes in each codec, all that is stored counted.

    python tools/bits_per_number.py                        # Self Forcing: chunks of 3 x 1560 rows
    python tools/bits_per_number.py --rows 48 --width 24   # the embedded model

Three numbers each: the closed form that a byte budget counts on, what is held once random rows have
been encoded (in bfloat16, of one head), and, for keys, the error left: the share of the variance
that does not come back. Rows of one chunk are coded together.
"""

from __future__ import annotations

import argparse
import sys

import torch

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.held import reachable_bytes
from lightning_kv.cache.rows import Segment


def clustered(rows: int, width: int) -> torch.Tensor:
    """Vectors around 64 centres, with some channels that stand out, ``[1, rows, width]``."""
    rng = torch.Generator().manual_seed(0)
    centre = 2 * torch.randn(64, width, generator=rng)
    x = centre[torch.randint(64, (rows,), generator=rng)] + torch.randn(rows, width, generator=rng)
    x[:, :: max(1, width // 4)] *= 5
    return x.to(torch.bfloat16).unsqueeze(0)


def table(rows: int, width: int) -> str:
    """One line for each codec."""
    x, lines = clustered(rows, width), []
    lines.append(f"{rows} rows coded together, heads of width {width}")
    lines.append(f"{'codec':16} {'keys':>7} {'values':>7} {'both':>7} {'held':>7} {'error':>7}")
    for name, coding in CODECS.items():
        each = [own.row_bytes(width, 2, rows) * 8 / width for own in (coding.keys, coding.values)]
        made = Segment.encoded(x, x, name)
        held = reachable_bytes(made) * 8 / (2 * x.numel())
        away = made.decoded("k").double() - x.double()
        error = (
            away.square().mean() / (x.double() - x.double().mean(1, keepdim=True)).square().mean()
        )
        both = coding.bits(width, 2, rows)
        numbers = " ".join(f"{n:7.3f}" for n in (*each, both, held))
        lines.append(f"{name:16} {numbers} {float(error):7.3f}")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4680, help="of a chunk (4680)")
    parser.add_argument("--width", type=int, default=128, help="of a head (128)")
    given = parser.parse_args()
    sys.stdout.write(table(given.rows, given.width) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
