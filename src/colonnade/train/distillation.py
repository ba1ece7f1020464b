"""The loss of tuning: the text's next tokens, and the dense model's distribution over them.

With targets y_t, the tuned model's distribution p_t and the dense model's q_t, both before token t,

    loss = mean over t of (1 - w) · (-log p_t[y_t]) + w · KL(q_t ‖ p_t),

the second term as in Hinton et al. 2015 (arXiv:1503.02531) at temperature 1. The first token of a
document has no target. Logits are computed a few positions at a time, forward and backward, so that
[positions, vocabulary] is never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from colonnade.train.data import IGNORED_LABEL
from colonnade.train.logits import AT_ONCE, Head, few, in_float


class Losses(NamedTuple):
    """Means over the positions that have a target, in nats.

    Attributes:
        cross_entropy: -log p_t[y_t].
        divergence: KL(q_t ‖ p_t); 0 without a dense model.
    """

    cross_entropy: Tensor
    divergence: Tensor

    def weighted(self, weight: float) -> Tensor:
        """Return (1 - weight) · cross entropy + weight · divergence."""
        # A weight of 0 or 1 must not let the other term in, not even as 0 · inf.
        terms = [(1 - weight, self.cross_entropy), (weight, self.divergence)]
        return torch.stack([factor * term for factor, term in terms if factor]).sum()


class Teacher:
    """The dense model, whose distribution is the target.

    Args:
        model: The model whose weights are those of the dense one while `context` is entered.
        attention: Name of the attention under which it is dense.
        adapters_off: Makes a context in which the model runs without its adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        attention: str,
        adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.head = head
        self._model = model
        self._attention = attention
        self._adapters_off = adapters_off

    @torch.no_grad()
    def states(self, **inputs: Tensor) -> Tensor:
        """Return the dense model's states [batch, length, width]."""
        with (
            self._adapters_off(),
            attending_by(self._model, self._attention),
            evaluating(self._model),
        ):
            return self.head.states(**inputs)


@contextmanager
def attending_by(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Run a model under another attention for a while; its configuration stays as it is saved."""
    config = model.config.get_text_config(decoder=True)
    inside = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
    before: str = config._attn_implementation

    def attend_by(name: str) -> None:
        model.set_attn_implementation({inside[0]: name} if inside else name)

    attend_by(attention)
    try:
        yield
    finally:
        attend_by(before)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def losses(
    head: Head,
    states: Tensor,
    labels: Tensor,
    teacher: Head | None = None,
    of_teacher: Tensor | None = None,
    at_once: int = AT_ONCE,
) -> Losses:
    """Return the losses of states under the labels of their own positions.

    Args:
        head: Where the states come from.
        states: [batch, length, width]; those of position t predict label t + 1.
        labels: [batch, length]; a label of -100 is not predicted.
        teacher: Where the dense model's states come from.
        of_teacher: The dense model's states [batch, length, width]; None: no divergence.
        at_once: Number of positions whose logits are in memory together.
    """
    following = labels[:, 1:].flatten()
    predicted = following != IGNORED_LABEL
    tensors = [following[predicted]]
    tensors += [
        each[:, :-1].flatten(0, 1)[predicted] for each in (states, of_teacher) if each is not None
    ]

    def sums(targets: Tensor, states: Tensor, of_teacher: Tensor | None = None) -> Tensor:
        """Add up both losses of a few positions."""
        log_p = in_float(head.logits(states)).log_softmax(-1)
        cross_entropy = F.nll_loss(log_p, targets, reduction="sum")
        if teacher is None or of_teacher is None:
            return torch.stack([cross_entropy, torch.zeros_like(cross_entropy)])
        with torch.no_grad():
            log_q = in_float(teacher.logits(of_teacher)).log_softmax(-1)
        divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        return torch.stack([cross_entropy, divergence])

    # Logits are computed again in the backward pass instead of being kept.
    parts = [
        checkpoint(sums, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in few(*tensors, at_once=at_once)
    ]
    total = torch.stack(parts).sum(0) / max(len(tensors[0]), 1)
    return Losses(total[0], total[1])
