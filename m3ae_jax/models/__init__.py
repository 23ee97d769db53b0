"""Flax modules: transformer, embeddings, encoder, decoder."""
