"""The training step of `transformers`' ViTMAE in PyTorch, of the same sizes, to compare with.

With AdamW (fused) and scaled-dot-product attention; on a GPU compiled, and under autocast if the config computes in
bfloat16. Its pictures are normalised beforehand; this project's step does that itself.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.errors import UserError
from m3ae_jax.objectives.m3ae import autoencoder_options

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}


class ViTMAE:
    """A model and its optimizer, on the GPU if there is one for JAX.

    Args:
        config: resolved; of pictures alone.
        on_gpu: whether it runs there.

    Raises:
        UserError: the config is of other modalities, or PyTorch or transformers is missing.
    """

    def __init__(self, config: ConfigDict, on_gpu: bool) -> None:
        if tuple(config.data.modalities) != ("image",):
            raise UserError(
                f"--against=vit_mae with data.modalities={tuple(config.data.modalities)!r}: it knows pictures alone; "
                "take configs/mae_base.py, or --config.data.modalities=image"
            )
        try:
            torch: Any = importlib.import_module("torch")
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise UserError(
                f"--against=vit_mae needs PyTorch and transformers ({error}): pip install -e '.[parity]'"
            ) from None
        model, data = config.model, config.data
        self._torch, self._device = torch, "cuda" if on_gpu else "cpu"
        self._bfloat16 = autoencoder_options(config, 0).encoder.dtype == "bfloat16"
        self.name = f"transformers {transformers.__version__}' ViTMAE, torch {torch.__version__}" + (
            ", compiled" if on_gpu else ""
        )
        torch.manual_seed(config.seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        of = transformers.ViTMAEConfig(
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=int(model.width * model.mlp_ratio),
            hidden_act=_ACTIVATIONS[model.activation],
            layer_norm_eps=model.layer_norm_epsilon,
            image_size=data.image_size,
            patch_size=data.patch_size,
            decoder_hidden_size=model.decoder_width,
            decoder_num_hidden_layers=model.decoder_depth,
            decoder_num_attention_heads=model.decoder_heads,
            decoder_intermediate_size=int(model.decoder_width * model.mlp_ratio),
            mask_ratio=model.image_mask_ratio,
            norm_pix_loss=config.loss.normalize_patches,
            attn_implementation="sdpa",
        )
        self._model: Any = transformers.ViTMAEForPreTraining(of).to(self._device).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=1e-4,
            betas=(config.optimizer.b1, config.optimizer.b2),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        shape = (config.batch_size, 3, data.image_size, data.image_size)
        self._pictures = torch.randn(shape, device=self._device)
        self._loss = torch.compile(self._compute) if on_gpu else self._compute

    def _compute(self, pictures: Any) -> Any:
        return self._model(pixel_values=pictures).loss

    def run(self, steps: int) -> None:
        """Runs steps to their end."""
        for _ in range(steps):
            with self._torch.autocast(self._device, self._torch.bfloat16, enabled=self._bfloat16):
                loss = self._loss(self._pictures)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """The most that it held on the GPU."""
        return self._torch.cuda.max_memory_allocated() if self._device == "cuda" else None
