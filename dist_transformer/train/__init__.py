"""The loop, its hooks, evaluation and faults."""
