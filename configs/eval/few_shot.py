r"""Linear probes on 1, 5, 10 and 25 examples a class, with intervals over draws.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/few_shot.py --workdir=RUN

All else is the checkpoint's own config.
Other data than scenes are named on the command line, for example

        --config.eval.train.source=class_folders --config.eval.train.path=DIR \
        --config.eval.test.source=class_folders --config.eval.test.path=DIR --config.eval.test.split=val
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("few_shot",)
    return c
