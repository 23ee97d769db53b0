"""Tasks of this field, each with its annotation files, metric and protocol."""
