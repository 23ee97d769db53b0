r"""A linear probe on frozen features, of an encoder, an untrained one and raw pixels.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/probe.py --workdir=RUN

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
    c.evals = ("probe",)
    return c
