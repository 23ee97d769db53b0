r"""The paper's linear classification on a frozen encoder, and on an untrained one.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/linear_probe.py --workdir=RUN

All else is the checkpoint's own config. The protocol's fields are config.eval.linear_probe; the defaults are those for
ImageNet. On scenes, whose captions speak of left and right, with captions in the input:

        --config.eval.linear_probe.input=both --config.eval.linear_probe.flip=false

LARS is made for many steps on large batches; on small data --config.eval.linear_probe.optimizer=sgd learns faster.
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
    c.evals = ("linear_probe",)
    return c
