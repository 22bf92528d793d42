"""Values of keys that people know by name, explained: schedules of the learning rate, and optimizers."""

from __future__ import annotations

from collections.abc import Mapping

from tune_magic.recipe.variant import Variant

_PROGRESS = "p = steps done since warm-up / steps after warm-up, from 0 to just below 1"
_FALL = f"η_t = η · (m + (1 − m) · {{}});  {_PROGRESS};  m = min_lr_rate"


def _schedule(name: str, summary: str, formula: str, source: str, when: str) -> Variant:
    return Variant(summary, formula, source, when, recipe={"lr_scheduler_type": name})


def _optimizer(name: str, summary: str, formula: str, source: str, when: str) -> Variant:
    return Variant(summary, formula, source, when, recipe={"optim": name})


VALUES: Mapping[str, Variant] = {
    "linear": _schedule(
        "linear", "The learning rate falls along a line from its peak.", _FALL.format("(1 − p)"),
        "As in Transformers.", "The default: towards 0 at the end of the run, or `min_lr_rate` of the peak.",
    ),
    "cosine": _schedule(
        "cosine", "The learning rate falls along half a cosine: slowly, quickly, slowly.",
        _FALL.format("½ (1 + cos π p)"), "Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts.",
        "Long runs: it stays near its peak for longer than `linear`.",
    ),
    "cosine_with_restarts": _schedule(
        "cosine_with_restarts", "The learning rate falls along a cosine, jumps back up, and falls again.",
        _FALL.format("½ (1 + cos(π · frac(num_cycles · p)))"), "Loshchilov and Hutter 2016, arXiv:1608.03983.",
        "To look at several ends of one run; give `num_cycles` in `lr_scheduler_kwargs`.",
    ),
    "polynomial": _schedule(
        "polynomial", "The learning rate falls as a power of what is left.", _FALL.format("(1 − p)^power"),
        "As in Transformers.", "As `linear`, falling earlier where `power` is above 1.",
    ),
    "constant": _schedule(
        "constant", "The learning rate stays at its peak after warm-up.", "η_t = η", "As in Transformers.",
        "Runs that will be prolonged, and comparisons that no schedule should touch.",
    ),
    "inverse_sqrt": _schedule(
        "inverse_sqrt", "The learning rate falls as one over the root of the steps; it has no end to reach.",
        "η_t = η · √(w / (w + t)) at step t after warm-up, from 0;  w = steps of warm-up",
        "Vaswani et al. 2017, arXiv:1706.03762.", "Runs whose end is open; it needs a warm-up worth the name.",
    ),
    "warmup_stable_decay": _schedule(
        "warmup_stable_decay", "The learning rate stays at its peak and falls along a line at the end.",
        _FALL.format("min(1, (1 − p) / decay_ratio)"), "Hu et al. 2024, arXiv:2404.06395.",
        "Runs of which one wants to branch off at any time, with a short fall at the end of each.",
    ),
    "reduce_lr_on_plateau": _schedule(
        "reduce_lr_on_plateau", "The learning rate is reduced whenever held-out loss falls no more.",
        "η_t = η · max(factor^k, min_lr_rate);  k = how often it was reduced", "As torch's ReduceLROnPlateau.",
        "Runs whose length is a guess; it needs held-out rows.",
    ),
    "adamw": _optimizer(
        "adamw", "Each parameter steps by its mean gradient over the root of its mean squared gradient.",
        "m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  θ ← θ − η (m̂ / (√v̂ + ε) + λ θ);  "
        "m̂, v̂: corrected for their start",
        "Loshchilov and Hutter 2017, arXiv:1711.05101.", "The default. Its two states take twice what the gradients take.",
    ),
    "adamw_8bit": _optimizer(
        "adamw_8bit", "AdamW whose two states have 8 bits a number, in blocks that share a scale.",
        "as `adamw`, with m and v rounded to 8 bits after each step",
        "Dettmers et al. 2022, arXiv:2110.02861; by bitsandbytes.",
        "Full fine-tuning where AdamW's state is what does not fit: it takes a quarter.",
    ),
    "paged_adamw_8bit": _optimizer(
        "paged_adamw_8bit", "As `adamw_8bit`; its states leave the GPU for the machine's memory when that is short.",
        "as `adamw_8bit`", "Dettmers et al. 2023, arXiv:2305.14314; by bitsandbytes.",
        "A GPU that is nearly full. On a CPU it is `adamw_8bit`.",
    ),
    "lion": _optimizer(
        "lion", "Each parameter steps by the same size along the sign of a mean of gradients.",
        "θ ← θ (1 − η λ) − η · sign(β₁ m + (1 − β₁) g);  m ← β₂ m + (1 − β₂) g", "Chen et al. 2023, arXiv:2302.06675.",
        "Half of AdamW's state; it takes a learning rate three to ten times lower.",
    ),
    "lion_8bit": _optimizer(
        "lion_8bit", "Lion whose state has 8 bits a number.", "as `lion`, with m rounded to 8 bits after each step",
        "Chen et al. 2023, arXiv:2302.06675; Dettmers et al. 2022, arXiv:2110.02861; by bitsandbytes.",
        "As `lion`, with a quarter of its state.",
    ),
    "sgd": _optimizer(
        "sgd", "Parameters step along a moving sum of their gradients.",
        "v ← μ v + g + λ θ;  θ ← θ − η v;  μ = adam_beta1", "torch.optim.SGD, with momentum after Polyak 1964.",
        "Half of AdamW's state; gradients of transformers differ so much in size that it needs a rate of its own.",
    ),
    "adafactor": _optimizer(
        "adafactor", "As Adam without a mean gradient, with the squared gradients of a matrix kept as row and column means.",
        "u = g / √V, V ≈ R Cᵀ / mean(R);  θ ← θ − min(η, 1 / √t) · max(ε, rms(θ)) · u / max(1, rms(u))",
        "Shazeer and Stern 2018, arXiv:1804.04235.",
        "Full fine-tuning where AdamW's state does not fit. Its steps are in proportion to the parameters: not beside "
        "LoRA's zeros.",
    ),
}  # fmt: skip
