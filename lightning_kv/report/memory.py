"""What the page shows of memory: which frames every policy kept and read, as pictures."""

from __future__ import annotations

from typing import Any

from lightning_kv.report import pictures
from lightning_kv.report.entries import PageRun
from lightning_kv.report.players import data_uri
from lightning_kv.report.prompts import Ranked, median
from lightning_kv.runs.traces import read_traces

# Pixels: how much room a picture has on a phone and on a desk.
OVERVIEW, STRIP, CLOSE_UP = (160, 220), (372, 1150), (320, 760)
OPEN = 2  # policies whose pictures are unfolded from the start
SHADES = {
    name: f"rgb{getattr(pictures, name)}"
    for name in ("GONE", "OWN", "HELD", "READ", "MERGED_HELD", "MERGED_READ")
}


def memory(run: PageRun, prompts: list[Ranked]) -> dict[str, Any] | None:
    """Pictures of what every policy keeps and reads on the median prompt that has a trace."""
    if not prompts:
        return None
    prompt = median(prompts)
    traces = read_traces(run.directory.traces / f"{prompt.key}.npz")
    order = [name for name in run.summary["policies"] if name in traces]
    telling = [name for name in order if pictures.heads_differ(traces[name])]
    rivals = [name for name in order if name != run.summary["reference"]]
    return {
        "prompt": prompt,
        "policies": [_pictured(name, traces[name]) for name in order],
        "open": (telling or rivals)[:OPEN],
    }


def _pictured(policy: str, trace: pictures.Trace) -> dict[str, Any]:
    """All pictures of one policy."""
    chunks, layers, heads, frames = trace["held"].shape
    says = pictures.describe(trace)
    close = pictures.close_up(trace, chunks - 1) if pictures.query_frames_differ(trace) else None
    last = f"{policy}, chunk {chunks}: what every head and query frame reads"
    return {
        "name": policy,
        "says": says,
        "overview": _image(
            pictures.overview(trace), f"{policy}, mean over all heads. {says}", OVERVIEW
        ),
        "layers": [
            _image(pictures.strip(trace, layer), f"{policy}, layer {layer + 1}, all heads", STRIP)
            for layer in range(layers)
        ],
        "heads": heads,
        "gap": 100 * pictures.GAP / (heads * (frames + pictures.GAP) + frames),
        "frames": frames,
        "chunks": chunks,
        "close_up": None if close is None else _image(close, last, CLOSE_UP),
    }


def _image(pixels: pictures.Pixels, alt: str, room: tuple[int, int]) -> dict[str, Any]:
    """A picture; its cells are whole pixels, as many as there is room for."""
    width = pixels.shape[1]
    return {
        "source": data_uri("image/png", pictures.png(pixels)),
        "alt": alt,
        "small": width * max(1, room[0] // width),
        "large": width * max(1, room[1] // width),
    }
