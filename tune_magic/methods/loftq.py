"""LoftQ's start of LoRA: the low-rank part of what quantisation lost (Li et al. 2023, arXiv:2310.08659).

One step of the paper's alternation, as in PEFT: the base stays as it was rounded, so it can still be shown by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer


@torch.no_grad()
def start(model: torch.nn.Module) -> int:
    """Set the matrices of every LoRA layer whose base has its matrix before rounding; returns how many.

    With W - Q = U S V', the best approximation of rank r is U_r S_r V_r'. Half of S goes to either matrix, and the
    layer's scaling is divided out, which PEFT leaves to whoever chooses `lora_alpha`.
    """
    count = 0
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        base, (name,) = layer.base_layer, layer.active_adapters
        original = getattr(base, "original", None)
        if original is None:
            continue
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        lost = original.to(base.weight.device, torch.float32) - base.dense(torch.float32)
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        rank = min(len(down), len(s))
        root = (s[:rank] / layer.scaling[name]).sqrt()
        up.zero_()
        up[:, :rank] = u[:, :rank] * root
        down[:rank] = root.unsqueeze(1) * v[:rank]
        base.original = None  # or every matrix would stay in memory in full
        count += 1
    return count
