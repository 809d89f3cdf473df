"""Evaluation: scores of a checkpoint by question kind, beside its baselines."""
