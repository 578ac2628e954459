"""The train step, its loop, metrics and evaluation."""
