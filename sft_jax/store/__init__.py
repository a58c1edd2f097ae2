"""What a run keeps: its directory, checkpoints and metrics."""
