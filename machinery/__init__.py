"""What the scripts stand on and a first reading skips; README has a line on each file."""
