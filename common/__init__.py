"""What every method shares: the seams, the loop, the data, the measurements."""
