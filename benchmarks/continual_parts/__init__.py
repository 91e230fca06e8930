"""Parts of `benchmarks/continual.py`."""
