"""Checkpoints of ours in somebody else's engine, and what it said."""
