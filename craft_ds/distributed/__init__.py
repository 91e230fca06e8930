"""Process groups: collectives, launcher environment, rank watchdog and preemption."""
