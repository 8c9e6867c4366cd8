"""What a scorer is taught offline: lists of frames with their worth, losses, and measures."""
