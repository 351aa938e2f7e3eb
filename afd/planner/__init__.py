"""What hardware costs, and what a model costs on it."""
