"""What rollouts are made from: policies, settings, lengths and sizes, contexts, latents on disk."""
