"""What the queries of a pass read."""
