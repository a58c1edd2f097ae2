"""Training: loss, optimizer, state, train step, compilation."""
