r"""Telling pictures of unknown classes from known ones: AUROC of two scores.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/ood.py --workdir=RUN

All else is the checkpoint's own config.
Other data than scenes are named on the command line, for example CIFAR-100 against
CIFAR-10 as in the paper's Figure 6

        --config.eval.train.source=tfds --config.eval.train.path=cifar100 \
        --config.eval.test.source=tfds --config.eval.test.path=cifar100 --config.eval.test.split=test \
        --config.eval.outside.source=tfds --config.eval.outside.path=cifar10 --config.eval.outside.split=test
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("ood",)
    return c
