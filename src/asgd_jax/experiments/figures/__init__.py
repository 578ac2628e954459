"""One module a figure of the paper; `asgd_jax.experiments.reproduce` says what each must have."""
