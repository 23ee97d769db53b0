"""Training steps of other programs, one a module; see ``benchmark/peer.py``."""
