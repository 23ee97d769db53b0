r"""M3AE enormous: an encoder of about 4 billion parameters, beyond the paper's sizes, with its recipe otherwise.

    python -m m3ae_jax.main --config=configs/enormous.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model

Encoder width / depth / heads 2560 / 52 / 40, decoder 512 / 8 / 16; 4.2 billion parameters with BERT's vocabulary.
Meant for: TPU v5e-16, v5p or v6e, by the plan (docs/plans.md); run on none of them. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.model.size = "enormous"
    return memory_lean(c)
