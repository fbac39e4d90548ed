"""Which weights share a scale.

Legend: O out features, I in features, g columns per group, G = ceil(I / g) groups, R rows of scales.

    kind      R    G            scale
    tensor    1    1            [1, 1]
    channel   O    1            [O, 1]     one per output row of a weight
    token     O    1            [O, 1]     one per row of an activation [T, D]; same arithmetic
    group     O    ceil(I / g)  [O, G]

A ragged tail (I not a multiple of g) is a shorter last group. `split` pads it with zeros, which changes nothing: every
range includes 0, and 0 is exact, so that the padding neither widens a range nor adds an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import RecipeError, did_you_mean

Kind = Literal["tensor", "channel", "group", "token"]
KINDS: tuple[Kind, ...] = ("tensor", "channel", "group", "token")

# Elements worked on at once: on a CPU the temporaries stay in the caches, elsewhere they amortise kernel launches.
CHUNK_ELEMENTS_CPU = 2**18
CHUNK_ELEMENTS_DEVICE = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Granularity:
    """The sharing of scales over a weight [O, I].

    Args:
        kind: tensor, channel, group or token.
        group_size: columns per group; for `group` only, at least 1.
    Raises:
        RecipeError: unknown kind; a group without size; a size without group.
    """

    kind: Kind
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"granularity: unknown kind '{self.kind}'.{did_you_mean(self.kind, KINDS)}")
        if self.kind == "group" and (self.group_size is None or self.group_size < 1):
            raise RecipeError(f"granularity: group needs group_size >= 1, not {self.group_size}. Use 32, 64 or 128.")
        if self.kind != "group" and self.group_size is not None:
            raise RecipeError(f"granularity: {self.kind} takes no group_size, but {self.group_size} was given.")

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share one scale (the last group may be shorter)."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Scales per row, G."""
        return -(-in_features // self.columns_per_group(in_features))

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape [R, G] of the scales of a weight [O, I]."""
        return (1 if self.kind == "tensor" else out_features, self.num_groups(in_features))

    def split(self, x: Tensor) -> Tensor:
        """Arrange [O, I] as [R, G, g]: one row of the last dimension per scale; a view unless the tail is ragged."""
        num_rows, in_features = x.shape
        if self.kind == "tensor":
            return x.reshape(1, 1, -1)
        width, num_groups = self.columns_per_group(in_features), self.num_groups(in_features)
        missing = width * num_groups - in_features
        if missing:
            x = torch.nn.functional.pad(x, (0, missing))
        return x.reshape(num_rows, num_groups, width)

    def join(self, groups: Tensor, in_features: int) -> Tensor:
        """Undo `split`: [R, G, g] back to [O, I], without the padding."""
        if self.kind == "tensor":
            return groups.reshape(-1, in_features)
        return groups.reshape(groups.shape[0], -1)[:, :in_features]


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Yield slices over the rows of [O, I] so small that work on one slice needs little memory."""
    num_rows, num_columns = x.shape
    elements = CHUNK_ELEMENTS_CPU if x.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
    step = max(1, elements // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
