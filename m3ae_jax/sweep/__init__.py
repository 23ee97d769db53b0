"""``python -m m3ae_jax.sweep``: a grid of runs, compared."""
