"""Ratios to a named baseline, both sides in one run: ``python -m benchmarks`` runs those that need no GPU."""
