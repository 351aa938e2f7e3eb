"""A deployment that never runs: discrete events on one simulated clock, with the workers' own policies deciding."""
