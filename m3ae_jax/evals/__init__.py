"""One file an evaluation; `run` runs them."""
