"""craft-ds: engines."""
