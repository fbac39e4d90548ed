"""Which numbers of a matrix share a scale.

Legend: O out features (or T tokens), I in features, g columns per group, G = ceil(I / g) groups, b rows per block,
R rows of scales.

    kind      R            G            scale
    tensor    1            1            [1, 1]
    channel   O            1            [O, 1]             one per output row of a weight
    token     T            1            [T, 1]             one per row of an activation [T, I]; same arithmetic
    group     O            ceil(I / g)  [O, G]
    block     ceil(O / b)  ceil(I / g)  [ceil(O / b), G]   tiles of b rows and g columns
    columns   1            ceil(I / g)  [1, G]             groups of columns shared by all rows (static activations)

A ragged tail (I not a multiple of g, O not of b) is a smaller last group. `split` pads it with zeros. They widen no
range, because every range includes 0; they add no error where 0 is exact, and elsewhere carry the weight 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import RecipeError, did_you_mean

Kind = Literal["tensor", "channel", "token", "group", "block", "columns"]
KINDS: tuple[Kind, ...] = ("tensor", "channel", "token", "group", "block", "columns")
SIZED: tuple[Kind, ...] = ("group", "block", "columns")

# Elements worked on at once: on a CPU the temporaries stay in the caches, elsewhere they amortise kernel launches.
CHUNK_ELEMENTS_CPU = 2**18
CHUNK_ELEMENTS_DEVICE = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Granularity:
    """The sharing of scales over a matrix [O, I].

    Args:
        kind: see the table above.
        group_size: columns per group; for `group`, `block` and `columns` only, at least 1.
        block_rows: rows per tile; for `block` only, at least 1.
    Raises:
        RecipeError: unknown kind; a size that the kind needs is missing, or one that it does not take is given.
    """

    kind: Kind
    group_size: int | None = None
    block_rows: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"granularity: unknown kind '{self.kind}'.{did_you_mean(self.kind, KINDS)}")
        if self.kind in SIZED and (self.group_size is None or self.group_size < 1):
            raise RecipeError(
                f"granularity: {self.kind} needs group_size >= 1, not {self.group_size}. Use 32, 64 or 128."
            )
        if self.kind not in SIZED and self.group_size is not None:
            raise RecipeError(f"granularity: {self.kind} takes no group_size, but {self.group_size} was given.")
        rows = self.block_rows
        if (rows is not None) != (self.kind == "block") or (rows is not None and rows < 1):
            raise RecipeError(
                f"granularity: block_rows {rows} with kind {self.kind}; block needs block_rows >= 1, "
                "the other kinds take none."
            )

    @property
    def spans_rows(self) -> bool:
        """Whether one scale covers all rows, so that no row can be fitted without the others."""
        return self.kind in ("tensor", "columns")

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share one scale (the last group may be shorter)."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Scales per row, G."""
        return -(-in_features // self.columns_per_group(in_features))

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape [R, G] of the scales of a matrix [O, I]."""
        num_rows = 1 if self.spans_rows else -(-out_features // (self.block_rows or 1))
        return num_rows, self.num_groups(in_features)

    def scale_rows(self, rows: slice) -> slice:
        """Rows of the scales that belong to the rows of a chunk, as `row_chunks` yields them."""
        if self.spans_rows:
            return slice(0, 1)
        return slice(rows.start // (self.block_rows or 1), -(-rows.stop // (self.block_rows or 1)))

    def split(self, x: Tensor) -> Tensor:
        """Arrange [O, I] as [R, G, n]: one row of the last dimension per scale; a view where the layout allows."""
        num_rows, in_features = x.shape
        if self.kind == "tensor":
            return x.reshape(1, 1, -1)
        width, num_groups = self.columns_per_group(in_features), self.num_groups(in_features)
        height = num_rows if self.kind == "columns" else self.block_rows or 1
        tiles = -(-num_rows // height)
        missing = (width * num_groups - in_features, height * tiles - num_rows)
        if any(missing):
            x = torch.nn.functional.pad(x, (0, missing[0], 0, missing[1]))
        if height == 1:
            return x.reshape(num_rows, num_groups, width)
        return x.reshape(tiles, height, num_groups, width).transpose(1, 2).reshape(tiles, num_groups, height * width)

    def join(self, groups: Tensor, num_rows: int, in_features: int) -> Tensor:
        """Undo `split`: [R, G, n] back to [O, I], without the padding."""
        if self.kind == "tensor":
            return groups.reshape(num_rows, in_features)
        height = num_rows if self.kind == "columns" else self.block_rows or 1
        if height > 1:
            tiles, num_groups, size = groups.shape
            groups = groups.reshape(tiles, num_groups, height, size // height).transpose(1, 2)
            groups = groups.reshape(tiles * height, num_groups, size // height)[:num_rows]
        return groups.reshape(groups.shape[0], -1)[:, :in_features]

    def row_chunks(self, x: Tensor) -> Iterator[slice]:
        """Yield slices over the rows of [O, I] so small that work on one needs little memory; no tile is cut."""
        return row_chunks(x, multiple=self.block_rows or 1)


def row_chunks(x: Tensor, *, multiple: int = 1) -> Iterator[slice]:
    """Yield slices over the rows of [O, I], each but the last a multiple of `multiple` rows long."""
    num_rows, num_columns = x.shape
    elements = CHUNK_ELEMENTS_CPU if x.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
    step = max(1, elements // max(1, num_columns) // multiple) * multiple
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
