"""From sources to batches; no jax."""
