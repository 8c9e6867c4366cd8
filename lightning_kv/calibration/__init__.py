"""What the budget of each head costs, measured in passes of the model that are thrown away."""
