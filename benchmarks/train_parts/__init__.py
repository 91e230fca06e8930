"""Parts of `train.py`, one comparison each."""
