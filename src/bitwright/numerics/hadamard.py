"""Hadamard matrices and their fast transform: rotations that spread every outlier over all columns.

A Hadamard matrix of order n has entries ±1 and orthogonal rows; over sqrt(n) it is a rotation. Rotating weight rows and
inputs alike changes no product, (x H)(W H)ᵀ = x H Hᵀ Wᵀ = x Wᵀ, but a single large entry of x becomes n entries of
1 / sqrt(n) of its size. Orders are 1, 2 and multiples of 4, built as 2^k · m:

    2^k   Sylvester        [[H, H], [H, -H]], symmetric; applied in O(n log n)
    m     Paley I          q + 1, q a prime power, q % 4 == 3             12 20 24 28 44 60 68 104 108 140 ...
          Paley II         2 (q + 1), q a prime power, q % 4 == 1         36 52 76 84 100 124 148 ...; symmetric
          four circulants  4 n, n in `MULTIPLIERS`, found by a search     92 156 172

The core of order m is applied as a dense matrix; m is the smallest that serves. 116 and 188 are the first orders left
out; multiples of them may exist (232 does not, 464 does: 463 is a prime). H is not symmetric in general: `transpose`
undoes a transform.

Reference: Paley, On orthogonal matrices, 1933; Goethals and Seidel, A skew Hadamard matrix of order 36, 1970. Rotations
of language models: QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456, whose cores are tables of literals.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor

from bitwright.errors import ShapeError

# Four ±1 sequences of length n that these numbers, multiplied to the indices mod n, leave alone: few enough to search.
MULTIPLIERS = {23: (22,), 39: (16,), 43: (42, 6)}

# Order of the dense factors of the 2^k part: wide enough for fast matrix products, narrow enough to stay O(n log n).
RADIX = 64


def hadamard_matrix(size: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an orthogonal matrix [size, size] whose entries are ±1 / sqrt(size).

    Raises:
        ShapeError: no construction for this size.
    """
    power, order = _split(size)
    return torch.kron(_sylvester(power), _core(order)).to(dtype) / math.sqrt(size)


def random_hadamard(size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return diag(±1) · H [size, size] for random signs: another rotation for each seed.

    Rows are rotated by x @ Q, so the signs stand before H; after it they would only flip signs of the result.

    Raises:
        ShapeError: no construction for this size.
    """
    signs = torch.randint(0, 2, (size, 1), generator=generator, device=generator.device) * 2 - 1
    return signs.to(dtype) * hadamard_matrix(size, dtype=dtype).to(generator.device)


def hadamard(x: Tensor, *, block: int | None = None, transpose: bool = False) -> Tensor:
    """Return x @ H along the last dimension, in O(n log n) but for the core of H.

    Args:
        x: [..., n] floats; not modified.
        block: columns that are rotated among themselves, as in kron(eye(n / block), hadamard_matrix(block)); n if None.
        transpose: apply Hᵀ, which undoes H.
    Returns:
        [..., n] in the dtype of x; computed in float32, or float64 for float64 inputs.
    Raises:
        ShapeError: no construction for this size, or blocks that do not divide n.
    Reference:
        QuaRot, arXiv:2404.00456, section 3. Block-diagonal for microscaling formats: arXiv:2509.23202.
    """
    num_columns = x.shape[-1] if x.ndim else 0
    size = num_columns if block is None else block
    if num_columns == 0 or size < 1 or num_columns % size:
        raise ShapeError(
            f"hadamard: blocks of {size} do not divide the {num_columns} columns of inputs {list(x.shape)}. "
            "Use a divisor."
        )
    power, order = _split(size)
    folded = 1 << (max(1, min(power, RADIX // order)).bit_length() - 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense = torch.kron(_sylvester(folded), _core(order)).to(device=x.device, dtype=wide) / math.sqrt(size)
    width = folded * order
    result = x.to(wide).reshape(-1, width) @ (dense.T if transpose else dense)
    rest = power // folded
    while rest > 1:
        factor = min(rest, RADIX)
        result = _sylvester(factor).to(device=x.device, dtype=wide) @ result.reshape(-1, factor, width)
        rest, width = rest // factor, width * factor
    return result.reshape(x.shape).to(x.dtype)


@lru_cache(maxsize=256)
def largest_hadamard_factor(size: int) -> int:
    """Return the largest block that divides `size` and for which a Hadamard matrix can be built: 4 for 188 = 4 · 47.

    Raises:
        ShapeError: size is not positive.
    """
    if size < 1:
        raise ShapeError(f"hadamard: a size must be positive, not {size}. Give the number of columns.")
    return next(n for n in range(size, 0, -1) if size % n == 0 and _find_split(n) is not None)


def _split(size: int) -> tuple[int, int]:
    """Return a power of two and the order of a core, whose product is `size`."""
    found = _find_split(size)
    if found is None:
        raise ShapeError(
            f"hadamard: no Hadamard matrix of size {size} can be built. Use block={largest_hadamard_factor(size)}, the "
            "largest divisor that works."
        )
    return found


@lru_cache(maxsize=1024)
def _find_split(size: int) -> tuple[int, int] | None:
    if size < 1:
        return None
    odd = size // (size & -size)
    if odd == 1:
        return size, 1
    order = 4 * odd
    while size % order == 0:
        if _construction(order) is not None:
            return size // order, order
        order *= 2
    return None


@lru_cache(maxsize=16)
def _sylvester(order: int) -> Tensor:
    """Entry (i, j) is -1 to the number of bits that i and j share; int8 [order, order]."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@lru_cache(maxsize=16)
def _core(order: int) -> Tensor:
    """A Hadamard matrix of an order that `_find_split` gave; int8 [order, order]."""
    build = _construction(order)
    assert build is not None
    return build()


def _construction(order: int) -> Callable[[], Tensor] | None:
    """How to build a matrix of this order that is not the double of another; None if no way is known here."""
    if order == 1:
        return partial(_sylvester, 1)
    if order % 4 == 0 and _prime_power(order - 1) is not None:
        return partial(_paley_one, order - 1)
    if order % 4 == 0 and order % 8 and _prime_power(order // 2 - 1) is not None:
        return partial(_paley_two, order // 2 - 1)
    return partial(_goethals_seidel, order // 4) if order % 4 == 0 and order // 4 in MULTIPLIERS else None


def _paley_one(q: int) -> Tensor:
    """I + S with S skew: the characters of a field of q % 4 == 3 elements, bordered."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _characters(q)
    matrix.diagonal().fill_(1)
    return matrix


def _paley_two(q: int) -> Tensor:
    """The bordered characters of a field of q % 4 == 1 elements, each entry a 2 x 2 block."""
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _characters(q)
    entry = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    on_diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(bordered, entry) + torch.kron(torch.eye(q + 1, dtype=torch.int8), on_diagonal)


def _characters(q: int) -> Tensor:
    """Entry (a, b): 1 if a - b is a square in the field of q elements, -1 if not, 0 if a = b; int8 [q, q]."""
    found = _prime_power(q)
    assert found is not None
    p, degree = found
    places = p ** torch.arange(degree)
    digits = torch.arange(q)[:, None] // places % p  # element i is the polynomial of these coefficients
    squares = torch.zeros(q, 2 * degree - 1, dtype=torch.int64)
    for i, j in product(range(degree), repeat=2):
        squares[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * degree - 2, degree - 1, -1):
        squares[:, top - degree : top] += squares[:, top : top + 1] * torch.tensor(_reduction(p, degree))
    character = torch.full((q,), -1, dtype=torch.int8)
    character[(squares[:, :degree] % p) @ places] = 1
    character[0] = 0
    return character[((digits[:, None] - digits) % p) @ places]


def _reduction(p: int, degree: int) -> tuple[int, ...]:
    """Coefficients r of an irreducible x^degree - r(x) mod p; up to degree 3 it is one if it has no root."""
    return next(
        r
        for r in product(range(p), repeat=degree)
        if all((x**degree - sum(c * x**i for i, c in enumerate(r))) % p for x in range(p))
    )


@lru_cache(maxsize=1024)
def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k, p an odd prime and k at most 3; None if there is no such pair."""
    if q < 3:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    return next(((p, k) for k in (1, 2, 3) if p**k == q), None) if p > 2 else None


def _goethals_seidel(n: int) -> Tensor:
    """Four circulants with A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4n, arranged so that all other products cancel."""
    shifts = (torch.arange(n) - torch.arange(n)[:, None]) % n
    a, b, c, d = (sequence[shifts] for sequence in _four_sequences(n))
    # A circulant times the flip is symmetric. Without flips the four sequences would have to be.
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    btr, ctr, dtr = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    rows = [[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _four_sequences(n: int) -> Tensor:
    """Return ±1 sequences, int8 [4, n], whose periodic autocorrelations add up to 0 at every shift but 0.

    Sequences are constant on the orbits of the multipliers, so that one shift stands for its whole orbit. An
    autocorrelation a is n minus a multiple of 4, and the numbers (n - a) / 4 of all shifts make the digits of one key:
    four sequences fit where the keys of two pairs add up to digits that all are n.
    """
    orbits = _orbits(n)
    signs = 1 - 2 * (torch.arange(2 ** len(orbits))[:, None] >> torch.arange(len(orbits)) & 1)
    sequences = torch.ones(len(signs), n, dtype=torch.int64)
    for i, orbit in enumerate(orbits):
        sequences[:, orbit] = signs[:, i : i + 1]
    shifts = sorted({min(orbit[0], *((-i) % n for i in orbit)) for orbit in orbits})
    digits = torch.stack([(n - (sequences * sequences.roll(s, 1)).sum(1)) // 4 for s in shifts], 1)
    places = (n + 1) ** torch.arange(len(shifts))
    keys, kinds = (digits @ places).unique(return_inverse=True)
    first, second = torch.triu_indices(len(keys), len(keys))
    pairs, order = (keys[first] + keys[second]).sort()
    wanted = n * places.sum() - pairs
    position = torch.searchsorted(pairs, wanted).clamp_(max=len(pairs) - 1)
    found = int((pairs[position] == wanted).nonzero()[0])
    chosen = [indices[order[i]] for i in (found, int(position[found])) for indices in (first, second)]
    return torch.stack([sequences[(kinds == kind).nonzero()[0, 0]] for kind in chosen]).to(torch.int8)


def _orbits(n: int) -> list[list[int]]:
    """The classes of 1 .. n - 1 that the multipliers of n connect."""
    orbits: list[list[int]] = []
    left = set(range(1, n))
    while left:
        orbit, reached = [], [min(left)]
        while reached:
            i = reached.pop()
            if i in left:
                left.remove(i)
                orbit.append(i)
                reached += [i * factor % n for factor in MULTIPLIERS[n]]
        orbits.append(sorted(orbit))
    return orbits
