"""What trainings have in common: their base, optimisers, teacher forcing, degraded clips."""
