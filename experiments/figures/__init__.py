"""One module a figure of the paper; `experiments.reproduce` says what each must have."""
