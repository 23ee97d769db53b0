"""``--mode=plan``: what fits where, by the TPU compiler."""
