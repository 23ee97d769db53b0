"""``python -m m3ae_jax.benchmark``: figures that anyone can repeat; none of them gates a test."""
