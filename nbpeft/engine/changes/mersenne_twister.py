"""Advances torch's generator of the CPU by many numbers without computing them.

It is the Mersenne twister MT19937 (Matsumoto & Nishimura 1998), a linear recurrence of 624 words of 32 bits. Every bit
of its words obeys one recurrence, with the characteristic polynomial φ over GF(2). So the words after D others are sums
of the next 19,937 words, chosen by the coefficients of x^D mod φ (Haramoto et al. 2008, "Efficient jump ahead for
F2-linear random number generators"). Products of polynomials are computed by FFT, in float64, where they are exact.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937
_TWIST = 0x9908B0DF
_UPPER, _LOWER = 0x80000000, 0x7FFFFFFF
_PRODUCT, _SUM = 40960, 20736
"""Lengths of FFTs: above 2 * 19,937, and above 19,937 + 623."""
_LEFT, _NEXT, _FIRST = 1, 2, 3
"""Places in the state of a generator as int64: words of the block that are left, the next one, the block."""


def advanced(state: Tensor, count: int) -> Tensor:
    """Returns the state of a generator after it has drawn some words more.

    Args:
        state: what ``Generator.get_state`` returned, uint8.
        count: number of words, at least 1.
    """
    made = state.clone()
    places = made.view(torch.int64)
    left = int(places[_LEFT]) & 0xFFFFFFFF
    block, last = divmod(_WORDS - left + count, _WORDS)
    if block:
        places[_FIRST : _FIRST + _WORDS] = _later(places[_FIRST : _FIRST + _WORDS], block)
    places[_LEFT] += _WORDS - last - left
    places[_NEXT] = last + 1
    return made


def _later(block: Tensor, count: int) -> Tensor:
    """The block of words that comes so many blocks after another one."""
    distance = _WORDS * (count - 1)  # from the next block: parts of the first word of a new generator are not used
    if distance < _DEGREE:
        return _continued(block, _WORDS * (count + 1))[-_WORDS:]
    words = _continued(block, 2 * _WORDS + _DEGREE)[_WORDS:-1]
    shifts = torch.arange(16, device="cpu")[:, None]
    pairs = ((words >> shifts) & 1) + (((words >> (shifts + 16)) & 1) << 16)  # two bits of each word in one number
    chosen = torch.fft.rfft(_power(distance), n=_SUM).conj()
    sums = torch.fft.irfft(torch.fft.rfft(pairs.double(), n=_SUM) * chosen, n=_SUM)[:, :_WORDS].round().long()
    return (((sums & 1) << shifts) | (((sums >> 16) & 1) << (shifts + 16))).sum(0)


def _continued(block: Tensor, length: int) -> Tensor:
    """A block of words, int64, and those after it up to a length."""
    words = torch.empty(length, dtype=torch.int64, device="cpu")
    words[:_WORDS] = block
    most = _WORDS - _MIDDLE  # so many words depend only on those before the first of them
    for end in range(_WORDS, length, most):
        first, count = end - _WORDS, min(most, length - end)
        mixed = (words[first : first + count] & _UPPER) | (words[first + 1 : first + count + 1] & _LOWER)
        words[end : end + count] = (
            words[first + _MIDDLE : first + _MIDDLE + count] ^ (mixed >> 1) ^ (mixed & 1) * _TWIST
        )
    return words


@lru_cache(maxsize=8)
def _power(exponent: int) -> Tensor:
    """The coefficients of x^exponent mod φ, 0.0 or 1.0, (19937,)."""
    later = max(0, exponent.bit_length() - 14)
    found = _zeros(_DEGREE)
    found[exponent >> later] = 1
    lower = _polynomial()[:-1]
    for place in reversed(range(later)):
        square = _zeros(2 * _DEGREE)
        square[::2] = found
        found = _rest(square)
        if exponent >> place & 1:
            top = found[-1].clone()
            found = found.roll(1)
            found[0] = 0
            found = (found + top * lower).remainder(2)
    return found


def _rest(dividend: Tensor) -> Tensor:
    """The remainder of a polynomial, (2 * 19937,), divided by φ."""
    inverse, lower = _transforms()
    quotient = _product(torch.fft.rfft(dividend[_DEGREE:], n=_PRODUCT), inverse)[_DEGREE : 2 * _DEGREE]
    taken = _product(torch.fft.rfft(quotient, n=_PRODUCT), lower)[:_DEGREE]
    return (dividend[:_DEGREE] + taken).remainder(2)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """The product of two polynomials over GF(2) that are given by their transforms."""
    return torch.fft.irfft(first * second, n=_PRODUCT).round().remainder(2)


@lru_cache(maxsize=1)
def _transforms() -> tuple[Tensor, Tensor]:
    """The transforms of the quotient x^(2 * 19937) / φ, and of φ without its first term."""
    reverse, size = _polynomial().flip(0), 1
    inverse = _zeros(1) + 1  # of the power series
    while size <= _DEGREE:
        size = min(2 * size, _DEGREE + 1)
        square = _zeros(size)
        square[::2] = inverse[: (size + 1) // 2]
        transforms = (torch.fft.rfft(part, n=_PRODUCT) for part in (square, reverse[:size]))
        inverse = _product(*transforms)[:size]
    return torch.fft.rfft(inverse.flip(0), n=_PRODUCT), torch.fft.rfft(_polynomial()[:-1], n=_PRODUCT)


@lru_cache(maxsize=1)
def _polynomial() -> Tensor:
    """The coefficients of φ, 0.0 or 1.0, (19938,)."""
    powers = [1]
    for _ in range(31):
        powers.append((powers[-1] << _WORDS - 1) ^ (powers[-1] << _MIDDLE - 1))
    found = (powers[31] << _WORDS) ^ (powers[31] << _MIDDLE)
    for place in range(31):
        if _TWIST >> place & 1:
            found ^= (powers[30 - place] << _WORDS) ^ (powers[30 - place] << _MIDDLE)
    found ^= _TWIST >> 31
    return torch.tensor([int(bit) for bit in reversed(f"{found:b}")], dtype=torch.float64, device="cpu")


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device="cpu")
