"""Decisions: one file per idea, in retain/, select/, budget/, positions/ and precision/."""
