"""craft-ds: retention."""
