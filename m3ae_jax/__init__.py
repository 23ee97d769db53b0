"""Multimodal masked pretraining in JAX, Flax and tf.data."""

__version__ = "0.1.0"
