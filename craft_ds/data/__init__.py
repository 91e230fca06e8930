"""Task data: LeRobot data sets, and how the samples of a step are divided among ranks."""
