"""The training step of `transformers`' ViTMAE in PyTorch, of the same sizes, to compare with.

With AdamW (fused) and scaled-dot-product attention; on a GPU compiled, and under autocast if the config computes in
bfloat16. Its pictures are normalised beforehand; this project's step does that itself.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.peer import Needs
from m3ae_jax.benchmark.timing import compute_dtype, cores
from m3ae_jax.convert.vitmae import architecture
from m3ae_jax.errors import UserError

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}


class Step:
    """A model and its optimizer, on the GPU if there is one for JAX; see `peer.Peer`.

    Raises:
        UserError: PyTorch or transformers is missing.
    """

    needs = Needs("m3ae", ("image",), "pictures alone; take --config=mae")

    def __init__(self, config: ConfigDict, caption_tokens: float) -> None:
        del caption_tokens
        on_gpu = jax.default_backend() == "gpu"
        try:
            torch: Any = importlib.import_module("torch")
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise UserError(
                f"--against=vit_mae needs PyTorch and transformers ({error}): pip install -e '.[parity]'"
            ) from None
        self._torch, self._device = torch, "cuda" if on_gpu else "cpu"
        self._bfloat16 = compute_dtype(config) == "bfloat16"
        compiled = ", compiled" if on_gpu else ""
        self.name = f"transformers {transformers.__version__}' ViTMAE, torch {torch.__version__}{compiled}"
        torch.manual_seed(config.seed)
        torch.set_num_threads(cores())
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        sizes = architecture(config) | {"hidden_act": _ACTIVATIONS[config.model.activation]}
        settings = transformers.ViTMAEConfig(**sizes, attn_implementation="sdpa")
        self._model: Any = transformers.ViTMAEForPreTraining(settings).to(self._device).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=1e-4,
            betas=(config.optimizer.b1, config.optimizer.b2),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        shape = (config.batch_size, 3, config.data.image_size, config.data.image_size)
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
