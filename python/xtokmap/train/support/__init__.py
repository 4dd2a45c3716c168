"""What a run needs around its steps: checkpoints, processes, health, reports, trackers."""
