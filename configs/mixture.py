r"""Pairs, texts alone and pictures alone in one run: a recipe to copy, on the built-in scenes until you name your own.

    python -m m3ae_jax.main --config=configs/mixture.py --workdir=DIR \
        --config.data.mixture.pairs.source=webdataset --config.data.mixture.pairs.path=SHARDS \
        --config.data.mixture.texts.source=text --config.data.mixture.texts.path=TEXTS \
        --config.data.mixture.pictures.source=folder --config.data.mixture.pictures.path=PICTURES \
        --config.data.tokenizer=FILE.model

Every batch holds half pairs, a quarter texts and a quarter pictures. The log and the metrics show the share, the
epochs and the losses of each source. Hardware: two CPU cores, as tiny.py. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, source_fields


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.batch_size = 64
    c.duration = "1200 steps"
    c.model.width, c.model.depth, c.model.heads = 128, 4, 4
    c.m3ae.decoder_width, c.m3ae.decoder_depth, c.m3ae.decoder_heads = 64, 2, 2
    c.compute.unroll = True  # faster on a CPU
    c.m3ae.image_mask_ratio = 0.5
    c.m3ae.text_mask_ratio = 0.5
    c.m3ae.text_weight = 1.0
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup = "200 steps"
    for name, modalities, weight in (("pairs", (), 2.0), ("texts", ("text",), 1.0), ("pictures", ("image",), 1.0)):
        source = source_fields()
        source.source, source.modalities, source.weight = "scenes", modalities, weight
        c.data.mixture[name] = source
    c.data.val.source = "scenes"
    c.data.tokenizer = "scenes"
    c.data.max_text_tokens = 16
    c.data.scenes.max_objects = 1
    c.data.scenes.image_size = c.data.image_size = 48
    c.data.patch_size = 8
    c.data.crop_scale = (0.7, 1.0)
    c.data.flip = False  # captions speak of left and right
    c.log_every = "100 steps"
    c.checkpoint.every = "300 steps"
    c.eval.every = "300 steps"
    c.eval.examples = 512
    return c
