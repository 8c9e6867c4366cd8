"""Speed, memory and waits of rollouts at real sizes."""
