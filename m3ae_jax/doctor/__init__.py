"""``--mode=inspect_data``: a look at the training data before the run."""
