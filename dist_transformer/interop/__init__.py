"""Weights in other libraries' names."""
