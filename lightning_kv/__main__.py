"""`python -m lightning_kv`."""

from lightning_kv.cli import main

if __name__ == "__main__":
    main()
