"""Bounds on how far floating point may be from the truth: from rounding, none of them tuned.

They hold for a computation that rounds its results to `dtype` once and does everything before that
in float32 (in float64 for float64), in any order. With u the unit roundoff of the computation, d
and e the widths of queries and values, and, for a query i that reads w keys,

    S = max_j |scale| · Σ|q||k|      the largest score, taken term by term
    B_ij = Σ|dO_i||v_j|,   D_i = Σ_j P_ij B_ij

a sum of m products is off by at most m·u times the sum of their absolute values, so

1. a score is off by (d + 2)·u·S: d terms, the scale itself, and the product with it;
2. score - peak is off by u·2S more, exp by a relative 6u, the sum of w weights by w·u; the log-sum-
   exp adds log(sum) and the peak, each at most S + w. Together, as an absolute error of the lse or
   as a relative error of any weight P, normalised by the sum or recomputed from the lse, at most
       rho = (2(d + 5)·S + 4w + 16)·u;
3. out = Σ P v is off by rho·Σ P|v|, where the 4w in rho covers the w·u of this sum too;
4. dP is off by e·u·B, delta = Σ P dP by (rho + (e + w + 1)·u)·D, so, whenever the scale comes in,
   dS = scale·P·(dP - delta + dlse) by sigma·|scale|·P·(B + D + |dlse|) with
       sigma = 2·rho + (e + w + 6)·u;
5. dQ sums w terms; dK and dV sum one term for each query of the group, in at most kv_len parts.

All of this is to first order. Twice the bound (machine epsilon is 2u) covers the higher orders.
A weight below the smallest normal number may be lost altogether: each weight counts for at least
that number divided by epsilon, of which a relative error of rho is more than the number itself.

Backend "native" rounds more in bfloat16: the operands of its products. Weights and the gradients of
scores have a relative error of 2^-8 each, delta is taken from a rounded output, and the exponential
is off by a relative 1.2e-4, and the log-sum-exp with it. OPERANDS and EXPONENTIAL, of which `check`
allows twice as much, cover all of these. Backend "triton" rounds the same operands in both types of
half precision, and less besides. Below the type's normal numbers an operand is off by half of their
spacing: in float16, for each pair, 2^-25 of a weight or of an unscaled gradient of a score.

In TF32 a product drops all but 10 bits of each operand, a relative error of t = 2^-10 if the bits
are cut off. So a score is off by 2t·S, the log-sum-exp by as much, and a weight by a relative 4t·S,
which rho takes in; P and V add 2t to the output, and sigma gets 4t for dO and V, dS and K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.cases import Case, Inputs, Results
from tests.oracle import dense_weights

OPERANDS = 2 * 2.0**-8
EXPONENTIAL = 1e-4
TF32 = 2.0**-10


def bounds(
    case: Case, inputs: Inputs, rounded_operands: bool = False, tf32: bool = False
) -> Results:
    """Return the largest error of each result before it is rounded to the type of the inputs.

    Args:
        case: The pattern and the sizes.
        inputs: The numbers, in the type that they were given in.
        rounded_operands: Allow for what "native" rounds in bfloat16 besides.
        tf32: Allow for products in TF32.
    """
    info = torch.finfo(torch.promote_types(inputs.query.dtype, torch.float32))
    eps = info.eps
    query, key, value, grad_out, grad_lse = inputs.double()
    of_heads = case.mask().to(query.device)
    mask = of_heads.repeat_interleave(case.group, 0)
    keys, values = (t.abs().repeat_interleave(case.group, 1) for t in (key, value))
    weights, _ = dense_weights(query, key, of_heads, case.scale)
    weights = weights.clamp(min=info.smallest_normal / eps).masked_fill(~mask, 0.0)
    largest = (abs(case.scale) * query.abs() @ keys.mT).masked_fill(~mask, 0.0)
    largest = largest.amax(-1, keepdim=True)
    width = mask.sum(-1, keepdim=True)
    terms = case.group * case.q_len + case.kv_len

    rho = eps * (2 * (case.qk_dim + 5) * largest + 4 * width + 16)
    if tf32:
        rho = rho + 4 * TF32 * largest
    lse = rho * (width > 0)
    products = grad_out.abs() @ values.mT
    mean = (weights * products).sum(-1, keepdim=True)
    sigma = 2 * rho + eps * (case.v_dim + width + 6)
    if rounded_operands:
        rho, sigma, lse = rho + OPERANDS, sigma + OPERANDS, lse + EXPONENTIAL
    if tf32:
        rho, sigma = rho + 2 * TF32, sigma + 4 * TF32
    d_scores = abs(case.scale) * weights * (products + mean + grad_lse.abs()[..., None])

    def of_key_heads(grads: Tensor) -> Tensor:
        shared: Tensor = grads.unflatten(1, (case.kv_heads, case.group))
        return shared.sum(2)

    of_type = torch.finfo(inputs.query.dtype)
    lost = mask * (of_type.eps / 2 * of_type.smallest_normal * rounded_operands)
    of_scores = abs(case.scale) * lost
    return Results(
        out=(rho * weights + lost) @ values,
        lse=lse[..., 0],
        grad_query=((sigma + eps * width) * d_scores + of_scores) @ keys,
        grad_key=of_key_heads(((sigma + eps * terms) * d_scores + of_scores).mT @ query.abs()),
        grad_value=of_key_heads(((rho + eps * terms) * weights + lost).mT @ grad_out.abs()),
    )


def check(
    case: Case,
    inputs: Inputs,
    actual: Results,
    expected: Results,
    rounded_operands: bool = False,
    *,
    tf32: bool = False,
    also_rounded: bool = False,
) -> None:
    """Assert that `actual`, in the inputs' type, is as near to float64's `expected` as it can be.

    `expected` may itself be off by the bound of float64, which is far below that of the other
    types and equal to that of float64: hence the factor 2. A rounding to `dtype` is off by half
    its epsilon relatively, and below the normal numbers by half their spacing. If `expected` is
    `also_rounded`, as another backend gives it, it may be as far off as `actual`.
    """
    for name, bound, found, true in zip(
        Results._fields,
        bounds(case, inputs, rounded_operands, tf32),
        actual,
        expected,
        strict=True,
    ):
        info = torch.finfo(found.dtype)
        rounding = info.eps / 2 * true.double().abs().nan_to_num(0.0, posinf=0.0, neginf=0.0)
        rounding += (info.eps / 2 * info.smallest_normal) * (bound > 0)
        allowed = (2 if also_rounded else 1) * (2 * bound + rounding)
        error = (found.double() - true).abs()
        wrong = ~((found.double() == true) | (error <= allowed))
        assert not wrong.any(), (
            f"{name} is off by {error[wrong].max():.3g} in {wrong.sum()} entries, where at most "
            f"{allowed[wrong].max():.3g} is allowed"
        )


def check_half_the_digits(actual: Tensor, expected: Tensor) -> None:
    """Assert that two float64 computations of one formula agree to half of float64's digits.

    For chains of modules, where a bound term by term would repeat the chain. They hold some
    thousand operations on numbers around 1: rounding stays near 1e-13, a different formula does
    not, and sqrt(eps) = 1.5e-8 of the largest entry lies between the two.
    """
    assert actual.dtype == expected.dtype == torch.float64
    assert actual.shape == expected.shape
    tolerance = math.sqrt(torch.finfo(torch.float64).eps) * expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance
