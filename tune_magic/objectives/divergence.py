"""How far two models' predictions lie apart: Kullback-Leibler divergences and Jensen-Shannon's, in nats.

P is the teacher, Q the student, both softmax(logits / T).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, kind: Divergence, *, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """Return D(P, Q) of each row, (rows,) float32.

    forward_kl: KL(P || Q) = sum of P log(P / Q), as in Hinton et al. 2015 (arXiv:1503.02531).
    reverse_kl: KL(Q || P), as in MiniLLM (Gu et al. 2023, arXiv:2306.08543).
    jensen_shannon: beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, as in generalised
    knowledge distillation (Agarwal et al. 2023, arXiv:2306.13649).

    Args:
        student: Logits, (rows, outputs).
        teacher: Logits of the same shape.
        kind: Which one.
        temperature: T.
        beta: Of `jensen_shannon`.
    """
    import torch

    p = torch.log_softmax(teacher.float() / temperature, -1)
    q = torch.log_softmax(student.float() / temperature, -1)
    match kind:
        case "forward_kl":
            return _kl(p, q)
        case "reverse_kl":
            return _kl(q, p)
        case _:
            middle = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
            return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of each row of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)
