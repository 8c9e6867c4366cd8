"""Commands: what each is told, and in which words it answers."""
