"""From clips to numbers: what the modules that measure have in common."""
