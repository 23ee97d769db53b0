"""Finding captions of pictures and pictures of captions, by features and by restored words.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/retrieval.py --workdir=RUN

All else is the checkpoint's own config.
It asks about the run's own data.val; --config.data.val.path=PATH names other pictures with captions.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("retrieval",)
    return c
