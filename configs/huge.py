r"""M3AE huge: the paper's recipe (256 px, patch 16, 64 text tokens, batch 4096) on your own image-text pairs.

    python -m m3ae_jax.main --config=configs/huge.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model

Encoder width / depth / heads 1280 / 32 / 16, decoder 512 / 8 / 16; 712 million parameters with BERT's vocabulary.
Meant for: TPU v5e-8 or more, by the plan (docs/plans.md); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.model.size = "huge"
    return memory_lean(c)
