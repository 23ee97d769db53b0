r"""M3AE giant: an encoder of about 1 billion parameters, beyond the paper's sizes, with its recipe otherwise.

    python -m m3ae_jax.main --config=configs/giant.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model

Encoder width / depth / heads 1536 / 36 / 24, decoder 512 / 8 / 16; 1.1 billion parameters with BERT's vocabulary.
Meant for: TPU v5e-8 or more, by the plan (docs/plans.md); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.model.size = "giant"
    return memory_lean(c)
