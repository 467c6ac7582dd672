"""Shards to batches: preparation, order, objectives, packing, streaming. Knows `dp_rank, dp_size` as ints
only.
"""
