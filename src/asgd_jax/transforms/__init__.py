"""Optax transforms with delay."""
