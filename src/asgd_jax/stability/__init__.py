"""When delayed SGD is stable: thresholds, growth times, learning-rate rules."""
