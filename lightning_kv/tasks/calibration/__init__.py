"""What calibration keeps on disk, what is concluded from it, and what it would take."""
