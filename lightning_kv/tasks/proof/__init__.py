"""What a proof of head budgets compares, what it concludes, and how that is said."""
