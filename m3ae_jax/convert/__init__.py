"""Other projects' weights in, and ours out: ``python -m m3ae_jax.convert``."""
