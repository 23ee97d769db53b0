r"""A small M3AE for sweeps: the paper's claims on the built-in scenes, in minutes a run on a CPU.

    python -m m3ae_jax.sweep --config=configs/claims.py --workdir=runs/claims_ratio \
        --grid="config.m3ae.text_mask_ratio=0.15,0.5,0.75,0.9" --equal_flops=text_mask_ratio --eval=probe

The probe tells the 56 combinations of colour and shape of a scene's object from its picture alone.
Hardware: two CPU cores, 3 to 7 minutes a run, two at a time. Result: docs/claims.md.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.batch_size = 64
    c.duration = "1400 steps"
    c.model.width, c.model.depth, c.model.heads = 96, 3, 3
    c.m3ae.decoder_width, c.m3ae.decoder_depth, c.m3ae.decoder_heads = 64, 1, 2
    c.compute.unroll = True  # faster on a CPU
    c.m3ae.image_mask_ratio = 0.5
    c.m3ae.text_mask_ratio = 0.75
    c.optimizer.learning_rate = 8e-3
    c.optimizer.warmup = "100 steps"
    c.data.train.source = c.data.val.source = "scenes"
    c.data.scenes.max_objects = 1
    c.data.tokenizer = "scenes"
    c.data.max_text_tokens = 16
    c.data.scenes.image_size = c.data.image_size = 32
    c.data.patch_size = 8
    c.data.image_mean, c.data.image_std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    c.data.crop_scale = c.data.crop_ratio = (1.0, 1.0)  # endless data needs no crops, and they blur
    c.data.flip = False  # captions speak of left and right
    c.log_every = "100 steps"
    c.checkpoint.every = "100_000 steps"  # at the end alone
    c.eval.every = "100_000 steps"
    c.eval.examples = 256
    c.eval.pictures = 4
    c.eval.label = "color_shape"
    c.eval.train_examples = 4000
    c.eval.test_examples = 3000
    c.evals = ("probe",)
    return c
