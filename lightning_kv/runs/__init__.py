"""What a run leaves on disk, and the rules that read it: summary, recommend, check."""
