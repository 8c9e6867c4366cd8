"""Which rows get which codec."""
