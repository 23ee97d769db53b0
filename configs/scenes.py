"""A larger M3AE on the built-in scenes: words are read off pictures, colours and shapes alike.

    python -m m3ae_jax.main --config=configs/scenes.py

Hardware: two CPU cores, 52 minutes. Result: of the hidden words that picture and caption determine colours are
restored to 1.000 and shapes to 0.998, with another scene's picture to 0.135 and 0.134 (docs/results.md).
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.batch_size = 32
    c.duration = "27000 steps"
    c.model.width, c.model.depth, c.model.heads = 128, 4, 4
    c.m3ae.decoder_width, c.m3ae.decoder_depth, c.m3ae.decoder_heads = 64, 2, 2
    c.compute.unroll = True  # faster on a CPU
    c.m3ae.image_mask_ratio = 0.15  # a shape is told by its whole outline
    c.m3ae.text_mask_ratio = 0.5
    c.m3ae.image_weight = 2.0  # or the words' larger loss hides the pictures'
    c.m3ae.text_weight = 1.0
    c.optimizer.learning_rate = 1.2e-2
    c.optimizer.b2 = 0.98
    c.optimizer.warmup = "500 steps"
    c.data.train.source = c.data.val.source = "scenes"
    c.data.scenes.max_objects = 1
    c.data.tokenizer = "scenes"
    c.data.max_text_tokens = 16
    c.data.scenes.image_size = c.data.image_size = 48
    c.data.patch_size = 8
    c.data.image_mean, c.data.image_std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    c.data.crop_scale = c.data.crop_ratio = (1.0, 1.0)  # endless data needs no crops, and they blur
    c.data.flip = False  # captions speak of left and right
    c.log_every = "200 steps"
    c.checkpoint.every = "3000 steps"
    c.eval.every = "3000 steps"
    c.eval.examples = 512
    c.evals = ("grounding",)
    return c
