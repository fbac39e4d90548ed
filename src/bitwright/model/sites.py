"""Weight sites: every matrix of a decoder block that a linear product reads, whatever module holds it.

A site is a weight, not a module. Most are the weight of an `nn.Linear`; GPT-2 stores [I, O]; in transformers 5 the
experts of a mixture are slices of one 3-D parameter, and their routers are modules of their own. Sites are found from
shapes alone, so a block on the meta device is enough. Which sites share an input is seen when the block runs
(`SiteCalls`).

Experts are seen one by one only if they run one by one: build the model with `experts_implementation="eager"` (or set
`config._experts_implementation = "eager"`), because the batched implementations gather copies of the weights.

Shapes: O out features, I in features, E experts.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.errors import StructureError

SiteKind = Literal["linear", "expert", "router"]
OnCall = Callable[["Site", Tensor], None]
StorageKey = tuple[int, int, int]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    """A 2-D weight, or a 3-D stack of experts, by its names inside the block."""

    path: str
    parameter: str
    out_features: int
    in_features: int
    transposed: bool
    num_experts: int | None


def find_blocks(model: nn.Module) -> tuple[str, list[str]]:
    """Return the name of the list of decoder blocks and the names of the blocks, in order.

    The blocks are the outermost `ModuleList` with the most weight matrices.

    Raises:
        StructureError: no `ModuleList` holds any weight matrix.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in modules_of(model).items():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists[name] = module
    sizes = {name: sum(parameter.ndim in (2, 3) for parameter in each.parameters()) for name, each in lists.items()}
    best = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(best):
        raise StructureError(
            f"{type(model).__name__}: no list of decoder blocks. Give a model whose blocks are in one ModuleList."
        )
    return best, [f"{best}.{child}" for child, _ in lists[best].named_children()]


def block_sites(block: nn.Module, prefix: str) -> list[Site]:
    """Return the weight sites of a block, in the order of its modules.

    Sites are 2-D weights and the slices of 3-D parameters; embeddings, norms and convolutions are not. Only shapes are
    read.

    Args:
        block: a decoder block; may be on the meta device.
        prefix: its name in the full model; empty for the model itself.
    """
    weights = list(_weights(block))
    kinds = _kinds(block, weights)
    return [
        Site(
            name=join(prefix, weight.path) + ("" if index is None else f"[{index}]"),
            parameter=join(prefix, weight.parameter),
            index=index,
            out_features=weight.out_features,
            in_features=weight.in_features,
            transposed=weight.transposed,
            kind=kind,
        )
        for weight, kind in zip(weights, kinds, strict=True)
        for index in ([None] if weight.num_experts is None else range(weight.num_experts))
    ]


def stacked_patterns(sites: Iterable[Site]) -> tuple[str, ...]:
    """Return patterns of a recipe, such as `*.experts.down_proj*`, that cover the slices of 3-D parameters."""
    stacks = (site.name.partition("[")[0].split(".") for site in sites if site.index is not None)
    return tuple(dict.fromkeys(f"*.{glob.escape('.'.join(names[-2:]))}*" for names in stacks))


def weight_view(block: nn.Module, site: Site, prefix: str) -> Tensor:
    """Return the weight of a site as a view [O, I]; writing to it changes the block."""
    weight = block.get_parameter(site.parameter[len(prefix) + 1 :] if prefix else site.parameter).detach()
    if site.index is not None:
        weight = weight[site.index]
    return weight.T if site.transposed else weight


def join(prefix: str, path: str) -> str:
    """Return the dotted name of `path` inside `prefix`; either may be empty."""
    return f"{prefix}.{path}" if prefix and path else prefix or path


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return every module inside `module`, itself included, by path."""
    return dict(cast(Iterable[tuple[str, nn.Module]], module.named_modules()))


def storage_key(tensor: Tensor) -> StorageKey:
    """Identify the memory that a tensor reads: (storage pointer, offset, numel). Views that reshape keep it."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


def _under(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(place + ".")


def _weights(block: nn.Module) -> Iterator[_Weight]:
    """Yield every weight in the block, in the order of its modules."""
    for path, module in modules_of(block).items():
        if isinstance(module, (*_TABLES, *_CONVS)) or _is_norm(module):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = parameter.shape
            if len(shape) == 2 and leaf == "weight":
                num_experts, transposed = None, _stores_inputs_first(module, parameter)
            elif len(shape) == 3 and min(shape[1:]) > 1:
                num_experts, transposed = shape[0], bool(getattr(module, "is_transposed", False))  # marks [E, I, O]
            else:
                continue
            yield _Weight(
                path=path if leaf == "weight" else join(path, leaf),
                parameter=join(path, leaf),
                out_features=shape[-1] if transposed else shape[-2],
                in_features=shape[-2] if transposed else shape[-1],
                transposed=transposed,
                num_experts=num_experts,
            )


def _kinds(block: nn.Module, weights: Sequence[_Weight]) -> list[SiteKind]:
    """Tell experts and routers from the rest; routers exist only beside experts."""
    stacks = {weight.parameter.rpartition(".")[0]: weight.num_experts for weight in weights if weight.num_experts}
    lists = _expert_lists(block, weights)
    counts = {place.rpartition(".")[0]: number for place, number in {**stacks, **lists}.items()}
    widths = {weight.in_features for weight in weights}
    kinds: list[SiteKind] = []
    for weight in weights:
        out = weight.out_features
        beside = [number for place, number in counts.items() if _under(weight.path, place)]
        if weight.num_experts or any(_under(weight.path, place) for place in lists):
            kinds.append("expert")
        elif out in beside or (beside and out < _FEW_ROWS and out not in widths):
            kinds.append("router")
        else:
            kinds.append("linear")
    return kinds


def _stores_inputs_first(module: nn.Module, weight: Tensor) -> bool:
    """GPT-2's layers store [I, O] and call their width `nf`."""
    return not hasattr(module, "in_features") and getattr(module, "nf", None) == weight.shape[1]


def _is_norm(module: nn.Module) -> bool:
    """A norm may have a 2-D weight (one row per head); what tells it from a projection is its epsilon."""
    return any("eps" in name and isinstance(value, float) for name, value in vars(module).items())


def _expert_lists(block: nn.Module, weights: Sequence[_Weight]) -> dict[str, int]:
    """Map the path of every list of experts that are modules to its length.

    What tells it from a block with two attentions in a list is a router: a weight beside it with a row for each.
    """
    lists = {path: each for path, each in modules_of(block).items() if path and isinstance(each, nn.ModuleList)}
    return {
        path: len(each)
        for path, each in lists.items()
        if len(each) > 1
        and any(parameter.ndim == 2 for parameter in each.parameters())
        and any(_routes(weight, path, len(each)) for weight in weights)
    }


def _routes(weight: _Weight, experts: str, num_experts: int) -> bool:
    beside = _under(weight.path, experts.rpartition(".")[0]) and not _under(weight.path, experts)
    return beside and weight.out_features == num_experts


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

    Weights are recognised by their memory, so transposed views and slices of 3-D parameters count. A weight that the
    model casts first (a router computed in float32 beside bfloat16 weights) is a copy and is not seen.

    Args:
        block: the block whose weights are in memory; they must stay in place while this is active.
        sites: its sites, as `block_sites` returns them.
        on_call: receives the site and its inputs; may raise to stop the forward.
    Raises:
        StructureError: a site is not in this block; or, during the forward, a weight is not oriented as its site says.
    """

    def __init__(self, block: nn.Module, sites: Sequence[Site], on_call: OnCall) -> None:
        super().__init__()
        self._on_call = on_call
        self._products: dict[StorageKey, list[tuple[Site, Tensor]]] = {}  # memory -> the sites it holds, as [O, I]
        prefix = _prefix_of(block, sites)
        for site in sites:
            view = weight_view(block, site, prefix)
            self._products[storage_key(view)] = [(site, view)]
        for site in sites:
            whole = block.get_parameter(site.parameter[len(prefix) + 1 :] if prefix else site.parameter)
            if site.index is not None and len(whole) > 1:
                stack = self._products.setdefault(storage_key(whole), [])
                stack.append((site, weight_view(block, site, prefix)))

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        places = _PRODUCTS.get(func)
        if places is not None:
            x, weight = (args[place] if place < len(args) else kwargs.get(name) for place, name in places)
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                self._report(x, weight, reads_inputs_first=func is not functional.linear)
        return func(*args, **kwargs)

    def _report(self, x: Tensor, weight: Tensor, *, reads_inputs_first: bool) -> None:
        read = weight[0] if weight.ndim == 3 else weight
        for site, view in self._products.get(storage_key(weight), []):
            expected = view.T if reads_inputs_first else view
            if (read.shape, read.stride()) != (expected.shape, expected.stride()):
                raise StructureError(
                    f"{site.parameter}: stored [{'O, I' if site.transposed else 'I, O'}] without saying so; "
                    "this architecture cannot be quantized yet."
                )
            is_batch = weight.ndim == 3 and x.ndim == 3 and site.index is not None
            self._on_call(site, x[site.index] if is_batch else x)


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
