"""What the trainer must know of a policy: its loss by token, its files, and the embedded tiny pi0_fast."""
