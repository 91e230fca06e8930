"""Anchors: samples of the old tasks, cached as the teacher's own processors see them."""
