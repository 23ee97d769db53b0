r"""A visual vocabulary: pictures into 4,375 ids and back, one id a patch of 16 pixels; ViT-B both ways, FSQ.

    python -m m3ae_jax.main --config=configs/visual_tokenizer.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS [--config.visual_tokenizer.quantizer=vq|kmeans]

kmeans is a codebook of pixels that takes minutes on a CPU. Hardware: by the plan (--mode=plan); neither run on TPUs
nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default("visual_tokenizer")
    c.batch_size = 1024
    c.duration = "20 epochs"
    c.optimizer.learning_rate = 1e-4  # 4M's, of a batch of 256
    c.optimizer.warmup = "5 epochs"
    c.optimizer.b2 = 0.99
    c.data.modalities = ("image",)
    c.data.crop_scale = (0.8, 1.0)
    c.evals = ("codebook",)
    return c
