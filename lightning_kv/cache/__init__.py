"""Memory: what is stored and how it is read. Needs torch alone."""
