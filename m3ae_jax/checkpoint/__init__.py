"""Saving, restoring, and starting from other weights."""
