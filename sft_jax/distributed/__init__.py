"""Several processes: how they meet, agree and stop."""
