"""What the papers compare with: baselines, in the style of the algorithm files."""
