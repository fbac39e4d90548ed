"""Round to nearest: the baseline that every other method must beat."""

from torch import Tensor

from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.qtensor import QTensor


def rtn(weight: Tensor, grid: AnyGrid) -> QTensor:
    """Round every weight [O, I] to the nearest value of its group's grid."""
    return QTensor(codes=grid.quantize(weight), grid=grid)
