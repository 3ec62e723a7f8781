"""Measuring a trained encoder: the commands of tools/evaluate.py (``add`` says what one takes, ``run`` does it), what
they train, and what is written down."""
