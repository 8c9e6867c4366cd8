"""How many frames each head may keep or read."""
