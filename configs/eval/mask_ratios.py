"""Patches and words restored at four mask ratios, side by side in one picture.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/mask_ratios.py --workdir=RUN

All else is the checkpoint's own config.
It restores the run's own data.val; --config.data.val.path=PATH names other examples, and
--config.eval.pictures=N how many are counted; drawn are four.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("mask_ratios",)
    return c
