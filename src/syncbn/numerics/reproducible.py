"""Sums that are the same to the bit however their terms are split over ranks: pure mathematics.

**Method.** A double is cut at fixed places, the powers 2²⁸ᵇ, into slices q·2²⁸ᵇ with an integer
|q| < 2²⁸. The cut depends on the term alone. Per column a set of terms is represented by the index
``top`` of the highest slice of its largest term, and by the sums of the slices top to top − 3
over all terms.

**Proof.** The slices' sums are sums of integers below 2⁵³ in magnitude, hence exact in float64 in
any order. Let J be the largest ``top`` of all sets. A set of ``top`` ≤ J knows its sums of the
slices J to J − 3: above its top its terms have none, down to top − 3 ≤ J − 3 it has them. So the
union's representation (J and four integers) is a function of the multiset of terms alone, and so is
any number computed from it.

**Accuracy.** What is left out of a term is below 2²⁸⁽ᴶ⁻³⁾, 2⁻⁸⁴ of the largest term or less: so the
sums of x and x² give a variance without cancellation that matters (at mean/deviation 10⁶ about
2⁻⁴⁴ of it is lost). Up to 2²³ samples; slices below 2⁻⁹⁵² are left out. Terms that are not finite
are summed apart, and make the result what they would make of any sum.

After J. Demmel and H. D. Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers
64 (2015), whose slices are rounded where these are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors.operators import define
from .moments import Moments

WIDTH = 28  # bits of a slice
SLICES = 4
_LOWEST = -31  # the lowest top: 2^(28·(−31 − 3)) = 2⁻⁹⁵² still has a reciprocal
_BASE = 24  # bits of B, with which the powers B^top of all tops are doubles
NUMBERS = 1 + SLICES + 1  # of a representation: top, slices, sum of what is not finite


def to_accumulator(terms: Tensor) -> Tensor:
    """The representation (6, K) of the sums over dimension 0 of float64 terms (M, K)."""
    finite = terms.isfinite()
    rest = torch.where(finite, terms, 0.0)
    nonfinite = torch.where(finite, 0.0, terms).sum(0)
    if not len(terms):
        return torch.cat(
            (torch.full_like(nonfinite, _LOWEST)[None], nonfinite.expand(SLICES + 1, -1))
        )
    largest = rest.abs().amax(0)
    _, exponent = torch.frexp(largest)  # largest < 2^exponent
    top = (exponent.to(terms.dtype) - 1).div(WIDTH, rounding_mode="floor")
    top = torch.where(largest > 0, top, _LOWEST).clamp_min(_LOWEST)
    sums = []
    for place in range(SLICES):
        bits = WIDTH * (top - place)
        slices = (rest * _power_of_two(-bits)).trunc()
        rest = rest - slices * _power_of_two(bits)
        sums.append(slices.sum(0))
    return torch.stack((top, *sums, nonfinite))


def finalise(sets: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (K,) of all terms in W representations (W, 6, K), as a double and what it lacks."""
    top, nonfinite = sets[:, 0].amax(0), sets[:, -1].sum(0)
    high, low = nonfinite, torch.zeros_like(nonfinite)
    for place, kept in enumerate(_slices_below(top, sets)):
        whole = kept.sum(0)
        high, error = _two_sum(high, whole * _power_of_two(WIDTH * (top - place)))
        low = low + error
    return high, torch.where(high.isfinite(), low, 0.0)


def _slices_below(top: Tensor, sets: Tensor) -> list[Tensor]:
    """What each set has in the slices top to top − 3; sets (*, 6, K) → (*, K) of each slice."""
    missing = top - sets[..., 0, :]  # of a set's own slices
    slices = []
    for place in range(SLICES):
        own = (place - missing).unsqueeze(-2)
        kept = sets[..., 1:-1, :].gather(-2, own.clamp_min(0).long())
        slices.append(torch.where(own >= 0, kept, 0.0).squeeze(-2))
    return slices


def union_by_sums(own: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """The representation (6, K) of all ranks' terms, of which a rank knows that of its own.

    add: the sum over ranks of their tensors, called twice. The first finds the highest top, J: the
    sum of W powers Bᵗᵒᵖ is at least Bᴶ, and less than Bᴶ⁺¹ as long as W < B.
    """
    powers_of, below = _powers_of_tops, _below_top
    if torch.compiler.is_compiling():  # inductor's C++ makes no doubles of bits
        powers_of, below = torch.ops.syncbn.powers_of_tops, torch.ops.syncbn.below_top
    rows = below(own, add(powers_of(own)))
    return torch.cat((rows[:1], add(rows[1:])))


def _powers_of_tops(own: Tensor) -> Tensor:
    """Bᵗᵒᵖ (K,)."""
    return _power_of_two(_BASE * own[0]).contiguous()


def _below_top(own: Tensor, powers: Tensor) -> Tensor:
    """What a set (6, K) is below the highest top of all, whose powers have these sums (K,)."""
    _, exponent = torch.frexp(powers)  # powers < 2^exponent
    top = (exponent.to(own.dtype) - 1).div(_BASE, rounding_mode="floor")
    return torch.stack((top, *_slices_below(top, own), own[-1]))


define(
    "powers_of_tops(Tensor own) -> Tensor",
    _powers_of_tops,
    lambda own: own.new_empty(own.shape[1:]),
)
define(
    "below_top(Tensor own, Tensor powers) -> Tensor",
    _below_top,
    lambda own, _: own.new_empty(own.shape),
)


def union_of_moments(own: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """The same of what :func:`moments_to_accumulator` makes, (1 + 12C,), all ranks' together."""
    count, halves = own[:1], own[1:].view(2, NUMBERS, -1)
    counts: list[Tensor] = []

    def add_with_count(tensor: Tensor) -> Tensor:
        total = add(torch.cat((count, tensor.flatten())))
        counts.append(total[:1])
        return total[1:].view(tensor.shape)

    union = union_by_sums(halves.movedim(0, 1).flatten(1), add_with_count)
    return torch.cat((counts[0], union.view(NUMBERS, 2, -1).movedim(1, 0).flatten()))


def moments_to_accumulator(samples: Tensor) -> Tensor:
    """What a rank sends of its samples' packed moments (N, 1 + 2C): (1 + 12C,).

    The count, and representations of Σ n·mean and of Σ (M2 + n·mean²), whose products go in whole.
    """
    channels = samples.shape[1] // 2
    n, mean, m2 = samples[:, :1], samples[:, 1 : 1 + channels], samples[:, 1 + channels :]
    sum_high, sum_low = _two_product(n, mean)
    square_high, square_low = _two_product(sum_high, mean)
    firsts = to_accumulator(torch.cat((sum_high, sum_low)))
    rest = torch.where(square_high.isfinite(), sum_low * mean, 0.0)  # never ∞ − ∞
    seconds = to_accumulator(torch.cat((square_high, square_low, rest, m2)))
    return torch.cat((n.sum().view(1), firsts.flatten(), seconds.flatten()))


def merge_moments(sets: Tensor) -> Tensor:
    """Packed moments (1 + 2C,) of the union of what W ranks sent (W, 1 + 12C)."""
    count = sets[:, 0].sum()
    divisor = count.clamp_min(1)
    (sum_high, sum_low), (square_high, square_low) = (
        finalise(half.reshape(len(half), NUMBERS, -1)) for half in sets[:, 1:].chunk(2, dim=1)
    )
    mean = (sum_high + sum_low) / divisor
    # Σ(x − m)² = Σx² − m·(2·Σx − n·m) for any m, here the mean rounded to a double.
    product, product_low = _two_product(divisor, mean)
    inner, inner_low = _two_sum(2 * sum_high, -product)
    inner_low = inner_low + (2 * sum_low - product_low)
    outer, outer_low = _two_product(mean, inner)
    m2, m2_low = _two_sum(square_high, -outer)
    m2_low = m2_low + (square_low - outer_low - mean * inner_low)
    m2 = torch.where(square_high.isfinite(), m2 + m2_low, square_high + (mean - mean))
    return Moments(count, mean, m2.clamp_min(0)).pack()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent to the bit, which exp2 need not give."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and the rounding's error (Knuth)."""
    total = a + b
    share = total - a
    return total, (a - (total - share)) + (b - share)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a·b rounded, and the rounding's error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, torch.where(error.isfinite(), error, 0.0)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """a as a sum of two numbers of 26 bits (Veltkamp)."""
    scaled = a * 134217729.0  # 2²⁷ + 1
    high = scaled - (scaled - a)
    return high, a - high
