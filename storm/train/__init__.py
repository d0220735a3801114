"""Pretraining: the loop, the engine that runs it on many ranks, and what it writes into the run folder."""
