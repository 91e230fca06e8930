"""Export of checkpoints as policy directories that stock LeRobot loads."""
