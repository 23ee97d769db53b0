r"""Labelled pictures in the plane by t-SNE of their features, beside those of an untrained encoder or another run.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/tsne.py --workdir=RUN --config.eval.tsne.beside=OTHER_RUN

All else is the checkpoint's own config. It needs scikit-learn: ``pip install -e '.[tsne]'``.
Other data than scenes are named on the command line, for example

        --config.eval.test.source=class_folders --config.eval.test.path=DIR --config.eval.test.split=val

Drawn are the first ten classes, at most 1,000 of their examples among the eval.test_examples that are read.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.eval.alone = True
    c.evals = ("tsne",)
    return c
