"""Evaluation: protocols, baselines and statistics on predictions and measurements."""
