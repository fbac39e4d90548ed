"""Hadamard rotations of inputs at inference: what no rotation of the weights before can reach.

Inputs x of a site become x H, its weight W becomes W H, and x H (W H)ᵀ = x Wᵀ, as H is orthogonal. An outlier spreads
over its block, so that inputs need fewer levels; weights become more alike (incoherent). It costs O(n log n) per token
at inference, and bitwright's own layout, which says so. Nothing is fitted, so no text is needed.

Microscaling formats (MXFP4, NVFP4) have a scale of their own for every 16 or 32 inputs, which keeps an outlier to
itself; a block as wide as theirs keeps that, a wider one spreads the outlier over groups that had none.

Reference: QuaRot, arXiv:2404.00456, section 4 (R4). Blocks for microscaling formats: arXiv:2509.23202.
"""

from collections.abc import Iterable
from dataclasses import replace

from bitwright.errors import RecipeError
from bitwright.methods.invariance import output_of
from bitwright.methods.stage import BlockStage
from bitwright.model.sites import Site
from bitwright.numerics.hadamard import largest_hadamard_factor
from bitwright.numerics.inputs import InputTransform
from bitwright.numerics.metrics import relative_error
from bitwright.recipe import Recipe


def rotate_all_inputs(stage: BlockStage) -> None:
    """Rotate the inputs of every quantized site of a block.

    Raises:
        RecipeError: blocks of the size asked for do not divide a row.
    """
    rotate_inputs(stage, [group.sites for group in stage.structure.groups], transform="hadamard")


def rotate_inputs(stage: BlockStage, groups: Iterable[tuple[str, ...]], *, transform: str) -> None:
    """Rotate the inputs of the quantized sites of some groups, and note how far that moves the block's output.

    Args:
        stage: gets an input transform for every such site, after a scale that is there already.
        groups: names of the sites that share inputs.
        transform: on whose behalf, for the notes.
    Raises:
        RecipeError: blocks of the size asked for do not divide a row.
    """
    before = output_of(stage)
    for group in groups:
        members = tuple(name for name in group if stage.planned(name) is not None)
        if not members:
            continue
        size = block_size(stage.sites[members[0]], stage.recipe)
        change = replace(stage.input_transforms.get(members[0], InputTransform()), hadamard=size)
        stage.input_transforms.update(dict.fromkeys(members, change))
        stage.notes.append(
            {
                "transform": transform,
                "what": f"inputs rotated at inference, blocks of {size}",
                "sites": list(members),
                "invariance": relative_error(before, output_of(stage, members)),
            }
        )


def block_size(site: Site, recipe: Recipe) -> int:
    """Return the size of the blocks in which a site's inputs are rotated.

    Raises:
        RecipeError: blocks of the size asked for do not divide a row, or have no Hadamard matrix.
    """
    width, block = site.in_features, recipe.rotation.block
    if block is None:
        return largest_hadamard_factor(width)
    if width % block or largest_hadamard_factor(block) != block:
        raise RecipeError(
            f"{site.name}: a Hadamard rotation in blocks of {block} does not fit rows of {width}. "
            f"Leave rotation.block out, which takes {largest_hadamard_factor(width)}."
        )
    return block
