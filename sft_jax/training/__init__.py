"""The optimisation step: loss, optimizer, state, step."""
