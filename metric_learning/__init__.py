"""Metric learning with labels or pairs: what leads to InstDisc and MoCo, and what follows them."""
