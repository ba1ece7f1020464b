"""Learnt sink logits: one more score in the softmax of each query head, which weighs no value.

They are learnt parameters, and other than the sinks of a pattern, which are positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def check_sink_logits(logits: Tensor, num_heads: int) -> None:
    """Refuse anything but one floating-point number for each query head.

    Raises:
        TypeError: It is no tensor of floating-point numbers.
        ValueError: There are more or fewer of them.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"learnt sink logits must be floating-point numbers, got {found}.")
    if logits.shape != (num_heads,):
        raise ValueError(
            "there must be one learnt sink logit for each query head, got a tensor of shape "
            f"{tuple(logits.shape)} for {num_heads} query heads."
        )


def with_sink_logits(
    out: Float[Tensor, "*batch heads q_len v_dim"],
    lse: Float[Tensor, "*batch heads q_len"],
    logits: Float[Tensor, " heads"],
) -> Float[Tensor, "*batch heads q_len v_dim"]:
    """Return out · sigmoid(lse - s): attention whose softmax has one more score s for each head.

    With the scores x_j that a query reads, lse = log Σ_j exp(x_j), and

        Σ_j exp(x_j) v_j / (exp(s) + Σ_j exp(x_j)) = out · exp(lse) / (exp(s) + exp(lse))

    A query that reads nothing has lse = -inf, and gives 0. All three get gradients. Where weights
    were dropped, the score s was not: as in transformers, which cuts its weight off before.

    Args:
        out: The attention without these scores.
        lse: The natural logarithm of its denominator, of scaled scores and before dropout.
        logits: The score s of each query head, which no scale multiplies.

    Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv:2508.10925), section 2.3.
    """
    # Finite, for -inf of a row without a key would meet that of a head without a sink.
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    share = torch.sigmoid(finite - logits[:, None])
    return (out * share[..., None]).to(out.dtype)
