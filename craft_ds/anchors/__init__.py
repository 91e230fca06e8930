"""craft-ds: anchors."""
