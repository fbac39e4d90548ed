"""Weight sites: every matrix of a decoder block that a linear product reads, whatever module holds it.

A site is a weight, not a module. Most are the weight of an `nn.Linear`; GPT-2 stores [I, O]; in transformers 5 the experts of a
mixture are slices of one 3-D parameter, and their routers are modules of their own. Sites are found from shapes alone, so a
block on the meta device is enough. Which sites share an input is seen when the block runs (`SiteCalls`).

Experts are seen one by one only if they run one by one: build the model with `experts_implementation="eager"` (or set
`config._experts_implementation = "eager"`), because the batched implementations gather copies of the weights.

Shapes: O out features, I in features, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.errors import StructureError

SiteKind = Literal["linear", "expert", "router"]
OnCall = Callable[["Site", Tensor], None]
StorageKey = tuple[int, int, int]
_Weight = tuple[
    str, str, tuple[int, int], bool, int | None
]  # site path, parameter, (O, I), transposed, number of experts

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FEW_ROWS = 16  # a weight with fewer rows, whose outputs no other weight reads, is a gate and not a projection


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One weight matrix that a linear product reads.

    Attributes:
        name: module path in the full model; an expert is `<path of the 3-D parameter>[<index>]`.
        parameter: full name of the parameter that holds the weight.
        index: which expert of a 3-D parameter; None for a 2-D parameter.
        out_features: O.
        in_features: I.
        transposed: the parameter stores [I, O].
        kind: linear, expert (may see few tokens or none), or router (decides which experts run, or how much).
    """

    name: str
    parameter: str
    index: int | None
    out_features: int
    in_features: int
    transposed: bool
    kind: SiteKind


def find_blocks(model: nn.Module) -> tuple[str, list[str]]:
    """Return the name of the list of decoder blocks and the names of the blocks, in order.

    The blocks are the outermost `ModuleList` with the most weight matrices.

    Raises:
        StructureError: no `ModuleList` holds any weight matrix.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists[name] = module
    sizes = {name: sum(parameter.ndim in (2, 3) for parameter in each.parameters()) for name, each in lists.items()}
    best = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(best):
        raise StructureError(
            f"{type(model).__name__}: no list of decoder blocks. Give a decoder model whose blocks are in one ModuleList."
        )
    return best, [f"{best}.{child}" for child, _ in lists[best].named_children()]


def block_sites(block: nn.Module, prefix: str) -> list[Site]:
    """Return the weight sites of a block, in the order of its modules.

    Sites are 2-D weights and the slices of 3-D parameters. Embeddings, norms and convolutions are none. Only shapes are read.

    Args:
        block: a decoder block; may be on the meta device.
        prefix: its name in the full model; empty for the model itself.
    """
    weights = list(_weights(block))
    stacks, lists = _expert_stacks(weights), _expert_lists(block)
    experts = {**stacks, **lists}
    in_features = {shape[1] for _, _, shape, _, _ in weights}
    sites: list[Site] = []
    for path, parameter, (out_width, in_width), transposed, num_experts in weights:
        kind: SiteKind = "linear"
        if num_experts is not None or any(_under(path, place) for place in lists):
            kind = "expert"
        elif any(_under(path, place.rpartition(".")[0]) and out_width == count for place, count in experts.items()) or (experts and out_width < _FEW_ROWS and out_width not in in_features):
            kind = "router"
        for index in [None] if num_experts is None else range(num_experts):
            sites.append(
                Site(
                    name=join(prefix, path) + ("" if index is None else f"[{index}]"),
                    parameter=join(prefix, parameter),
                    index=index,
                    out_features=out_width,
                    in_features=in_width,
                    transposed=transposed,
                    kind=kind,
                )
            )
    return sites


def weight_view(block: nn.Module, site: Site, prefix: str) -> Tensor:
    """Return the weight of a site as a view [O, I]; writing to it changes the block."""
    weight = block.get_parameter(site.parameter[len(prefix) + 1 :] if prefix else site.parameter).detach()
    if site.index is not None:
        weight = weight[site.index]
    return weight.T if site.transposed else weight


def join(prefix: str, path: str) -> str:
    """Return the dotted name of `path` inside `prefix`; either may be empty."""
    return f"{prefix}.{path}" if prefix and path else prefix or path


def storage_key(tensor: Tensor) -> StorageKey:
    """Identify the memory that a tensor reads: (storage pointer, offset, numel). Views that reshape keep it."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()


def _under(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(place + ".")


def _weights(block: nn.Module) -> Iterator[_Weight]:
    """Yield every weight in the block."""
    for path, module in block.named_modules():
        if isinstance(module, (*_TABLES, *_CONVS)) or _is_norm(module):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            place = path if leaf == "weight" else join(path, leaf)
            if len(shape) == 2 and leaf == "weight":
                transposed = _stores_inputs_first(module, parameter)
                yield place, join(path, leaf), shape[::-1] if transposed else shape, transposed, None
            elif len(shape) == 3 and min(shape[1:]) > 1:
                transposed = bool(getattr(module, "is_transposed", False))  # how transformers marks [E, I, O]
                yield place, join(path, leaf), shape[:0:-1] if transposed else shape[1:], transposed, shape[0]


def _stores_inputs_first(module: nn.Module, weight: Tensor) -> bool:
    """GPT-2's layers store [I, O] and call their width `nf`."""
    return not hasattr(module, "in_features") and getattr(module, "nf", None) == weight.shape[1]


def _is_norm(module: nn.Module) -> bool:
    """A norm may have a 2-D weight (one row per head); what tells it from a projection is its epsilon."""
    return any("eps" in name and isinstance(value, float) for name, value in vars(module).items())


def _expert_stacks(weights: Iterable[_Weight]) -> dict[str, int]:
    """Map the path of every module with 3-D weights to its number of experts."""
    return {parameter.rpartition(".")[0]: num for _, parameter, _, _, num in weights if num is not None}


def _expert_lists(block: nn.Module) -> dict[str, int]:
    """Map the path of every list of modules with weights inside the block to its length: experts that are modules."""
    return {
        path: len(module)
        for path, module in block.named_modules()
        if path
        and isinstance(module, nn.ModuleList)
        and len(module) > 1
        and any(p.ndim == 2 for p in module.parameters())
    }


# Products that a weight enters, with the place and name of the activations and of the weight among the arguments.
_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    functional.linear: ((0, "input"), (1, "weight")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ((0, "input"), (1, "other"))),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ((0, "input"), (1, "mat2"))),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ((1, "mat1"), (2, "mat2"))),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ((1, "batch1"), (2, "batch2"))),
}


class SiteCalls(TorchFunctionMode):
    """While active, calls `on_call(site, x)` before every product of activations x [..., I] with the weight of a site.

    Weights are recognised by their memory, so transposed views and slices of 3-D parameters count. A weight that the model
    casts first (a router computed in float32 beside bfloat16 weights) is a copy and is not seen.

    Args:
        block: the block whose weights are in memory; they must stay in place while this is active.
        sites: its sites, as `block_sites` returns them.
        on_call: receives the site and its inputs; may raise to stop the forward.
    Raises:
        StructureError: a site is not in this block.
    """

    def __init__(self, block: nn.Module, sites: Sequence[Site], on_call: OnCall) -> None:
        super().__init__()
        self._on_call = on_call
        self._sites: dict[StorageKey, Site] = {}
        self._stacks: dict[StorageKey, list[Site]] = {}
        prefix = _prefix_of(block, sites)
        for site in sites:
            self._sites[storage_key(weight_view(block, site, prefix))] = site
            if site.index is not None:
                whole = block.get_parameter(site.parameter[len(prefix) + 1 :] if prefix else site.parameter)
                self._stacks.setdefault(storage_key(whole), []).append(site)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        places = _PRODUCTS.get(func)
        if places is not None:
            x, weight = (args[place] if place < len(args) else kwargs.get(name) for place, name in places)
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                self._report(x, weight)
        return func(*args, **kwargs)

    def _report(self, x: Tensor, weight: Tensor) -> None:
        key = storage_key(weight)
        site = self._sites.get(key)
        if site is not None:
            self._on_call(site, x)
        for expert in self._stacks.get(key, []) if x.ndim == 3 else []:
            assert expert.index is not None
            self._on_call(expert, x[expert.index])


def _prefix_of(block: nn.Module, sites: Sequence[Site]) -> str:
    """Find the name of the block in the full model from the names of its sites."""
    if not sites:
        return ""
    own = sorted((name for name, _ in block.named_parameters(remove_duplicate=False)), key=len, reverse=True)
    for name in own:
        full = sites[0].parameter
        if full == name or full.endswith("." + name):
            prefix = full[: -len(name)].rstrip(".")
            if {site.parameter for site in sites} <= {join(prefix, each) for each in own}:
                return prefix
    raise StructureError(
        f"{sites[0].parameter}: not a weight of this block. Pass the sites that block_sites found in it."
    )
