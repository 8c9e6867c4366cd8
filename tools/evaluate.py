"""`lightning-kv evaluate` for launchers that want a script.

fabric run --accelerator cpu --devices 2 --strategy ddp tools/evaluate.py -- -c CONFIG
torchrun --nproc-per-node 2 tools/evaluate.py -c CONFIG
"""

import sys

from lightning_kv.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
