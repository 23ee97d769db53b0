"""The M3AE reference as in `peers.m3ae`, at a text length of 256."""

from __future__ import annotations

import m3ae_jax.benchmark.peers.m3ae as m3ae


class Step(m3ae.Step):
    """See `peers.m3ae.Step`."""

    text_tokens = 256
