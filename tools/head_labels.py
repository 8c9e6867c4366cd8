"""Write the head labels of the embedded model again, by each method's profile rule.

    python tools/head_labels.py

Rolls the full cache out from prompts of all palettes and sizes, and writes
`lightning_kv/policies/heads/METHOD-panorama.json`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import product

from lightning_kv.data.panorama import PALETTES, SIZES, SPEEDS, STARTS
from lightning_kv.models import load_model
from lightning_kv.policies.profiles import RULES
from lightning_kv.policies.tables import HEADS
from lightning_kv.tasks.calibration.labels import save_labels
from lightning_kv.tasks.measuring.head_profiles import labels_of, profile


def main() -> None:
    """Profile once, and write a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="panorama")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--frames", type=int, default=60)
    options = parser.parse_args()
    words = PALETTES, SPEEDS, [f"n{size}" for size in SIZES], STARTS
    every = [" ".join(own) for own in product(*words)]
    chosen = every[:: max(1, len(every) // options.prompts)][: options.prompts]
    again = f"python tools/head_labels.py --prompts {options.prompts} --frames {options.frames}"
    model = load_model(options.model)
    found = profile(model, chosen, options.frames)
    for method in RULES:
        labels = labels_of(method, found)
        counts = Counter(word for row in labels for word in row)
        about = ", ".join(f"{count} {word}" for word, count in counts.most_common())
        name = f"{method}-{options.model}"
        told = f"{about} heads of the embedded model, by the method's rule in profiles.py"
        save_labels(HEADS / f"{name}.json", labels, method, options.model, told, again)
        print(name, about)


if __name__ == "__main__":
    main()
