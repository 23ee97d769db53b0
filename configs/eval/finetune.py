r"""The paper's fine-tuning: encoder and classifier trained together.

    python -m m3ae_jax.main --mode=eval --config=configs/eval/finetune.py --workdir=RUN

All else is the checkpoint's own config. The protocol's fields are config.eval.finetune; the defaults are those for
ImageNet. On scenes, whose captions speak of left and right, with captions in the input:

        --config.eval.finetune.input=both --config.eval.finetune.flip=false

Where memory is short, --config.model.remat=full keeps less for the backward pass.
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
    c.evals = ("finetune",)
    return c
