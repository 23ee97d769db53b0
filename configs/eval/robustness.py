r"""A linear probe on frozen features under attacks on the pictures (FGSM, PGD) and their common corruptions.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/robustness.py --workdir=RUN

All else is the checkpoint's own config.
Other data than scenes are named on the command line, for example

        --config.eval.train.source=class_folders --config.eval.train.path=DIR \
        --config.eval.test.source=class_folders --config.eval.test.path=DIR --config.eval.test.split=val

and how far a pixel value may be moved, of 255, with ``--config.eval.robustness.epsilons=1,2,4,8``.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("robustness",)
    return c
