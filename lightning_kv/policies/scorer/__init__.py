"""A learned scorer as it runs inside a policy: what it sees, how it ranks, its file."""
