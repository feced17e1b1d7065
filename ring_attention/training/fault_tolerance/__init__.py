"""What keeps a run alive, or ends it well: other processes, signals, locks, damage, numbers that are not finite."""
