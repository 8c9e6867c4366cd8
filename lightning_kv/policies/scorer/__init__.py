"""A learned scorer: what it sees of each frame, the networks that rank frames, and their file."""
