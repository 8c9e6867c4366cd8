"""What stays in memory."""
