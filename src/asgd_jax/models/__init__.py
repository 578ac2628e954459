"""Flax Linen models of the paper."""
