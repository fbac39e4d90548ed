"""The schemes that a search chooses from unless it is given others.

A wide menu of integers loses clearly less at the same size than one scheme for each number of bits: between two numbers
of bits, groups of 64 and 128 and whole rows are the steps in which a budget can be spent, and above 8 bits in rows
nothing but 16 bit would be left. What never earned a place in an optimum (two bits with groups of 32 cost half a bit
each) is left out.

Where every site may choose alone, nothing has to load in vLLM, and tables join: 4 bits with levels where weights are
dense lose less than 4 bits in equal steps.
"""

from collections.abc import Sequence

from bitwright.errors import RecipeError, ShapeError
from bitwright.model.sites import Site
from bitwright.recipe import Ragged, Recipe, resolve
from bitwright.schemes import Scheme

INTEGERS = (
    "W2A16-g64", "W3A16-channel", "W3A16-g128", "W3A16-g64", "W4A16-channel", "W4A16-g128", "W4A16-g64", "W4A16-g32",
    "W5A16-channel", "W5A16-g128", "W5A16-g64", "W6A16-channel", "W6A16-g128", "W7A16-channel", "W7A16-g128",
    "W8A16-channel", "W8A16-g128", "W8A16-g32",
)  # fmt: skip
TABLES = ("lloyd3-gaussian-g64", "nf4-g64-dq", "lloyd4-gaussian-g64", "fp6-e2m3-g128")
"""Only bitwright's own layout holds these."""


def default_menu(sites: Sequence[Site], ragged: Ragged, *, tables: bool) -> tuple[str, ...]:
    """Return the schemes whose groups fit the rows of every site.

    Args:
        sites: of the model, those that can be quantized.
        ragged: what the recipe does with a row that a group size does not divide.
        tables: whether schemes that only bitwright's own layout holds are wanted.
    Raises:
        RecipeError: none fits.
    """
    offered = (*INTEGERS, *TABLES) if tables else INTEGERS
    menu = tuple(name for name in offered if fits(name, sites, ragged))
    if not menu:
        raise RecipeError("no scheme of the default menu fits every site. Give --schemes that do.")
    return menu


def fits(scheme: str, sites: Sequence[Site], ragged: Ragged) -> bool:
    """Whether a recipe would quantize every site by a scheme."""
    try:
        resolve(Recipe(scheme=Scheme.parse(scheme), ignore=(), ragged=ragged), sites)
    except ShapeError:
        return False
    return True
