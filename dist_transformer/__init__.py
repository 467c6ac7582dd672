"""Pretrain encoder-decoder Transformers on a cluster: exact, elastic, fast, pleasant."""

__version__ = "0.1.0"
