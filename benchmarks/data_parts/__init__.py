"""The parts of `benchmarks/data.py`: the figures, the shards that are measured, and each measurement."""
