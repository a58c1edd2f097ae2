"""Finds rows that seldom belong in training data: duplicates, leaks, broken answers, outliers, secrets."""
