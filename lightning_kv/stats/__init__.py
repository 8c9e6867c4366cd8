"""Statistics of runs: numpy and scipy only."""
