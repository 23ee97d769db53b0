"""The device mesh, and runs of several processes."""
