r"""M3AE enormous: an encoder of about 4 billion parameters, beyond the paper's sizes, with its recipe otherwise.

    python -m m3ae_jax.main --config=configs/enormous.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model

Encoder width / depth / heads 2560 / 52 / 40, decoder 512 / 8 / 16; 4.2 billion parameters with BERT's vocabulary.
Meant for: TPU v5p-128 or v6e-256 or more. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.model.size = "enormous"
    c.model.remat = "full"
    c.model.attention_head_groups = 4
    c.loss.vocabulary_blocks = 8
    c.mesh.preset = "fsdp"
    return c
