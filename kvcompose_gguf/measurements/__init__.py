"""What was measured about a model, as values that methods read."""
