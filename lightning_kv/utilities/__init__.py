"""What every part of the package may use: how numbers are written, and what a name may mean."""
