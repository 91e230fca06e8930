"""LeRobot's pi0_fast: token loss, generation and vision."""
