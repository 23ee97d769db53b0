"""What words look at in the picture, and patches in the caption: the encoder's attention, drawn and measured.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/attention.py --workdir=RUN

All else is the checkpoint's own config.
It asks about the run's own data.val; --config.data.val.path=PATH names other pictures with captions, and
--config.eval.attention.layer=N another layer of the encoder, from 0, than the last.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("attention",)
    return c
