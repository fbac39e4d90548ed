"""LoRA: a trained matrix of low rank beside a weight that stays as it is, dense or packed.

    W' = W + scaling · B A        A [r, I], B [O, r], scaling = alpha / r, or alpha / sqrt(r) (rank-stabilised)

A starts random and B at 0, so that training starts at the model itself. Over a packed weight this is QLoRA. The
adapter computes in its own dtype (float32 unless it is cast) and is added before the sum is rounded to that of the
layer's output, as PEFT does it.

Legend: O out features, I in features, r rank.

Reference: arXiv:2106.09685 (LoRA), arXiv:2312.03732 (rank-stabilised), arXiv:2305.14314 (QLoRA).
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import RecipeError
from bitwright.model.sites import modules_of
from bitwright.nn.frozen import frozen_linear
from bitwright.nn.linear import QuantizedLinear
from bitwright.recipe import matches
from bitwright.train.target_layers import ALL_TARGETS, Conv1D, Layer, linear_layers, select, shape_of

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """What adapters a model gets.

    Args:
        rank: r; at least 1.
        alpha: strength; above 0.
        dropout: share of an adapter's inputs set to 0 in training; 0 <= dropout < 1.
        rslora: divide alpha by sqrt(r) instead of r, so that larger ranks do not learn more slowly.
        targets: patterns (as in a recipe) of the linear layers of the decoder blocks that get one.
    Raises:
        RecipeError: a value outside its range, or a pattern that is no regular expression.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ALL_TARGETS

    def __post_init__(self) -> None:
        _check(self.rank >= 1, "rank", self.rank, "at least 1")
        _check(self.alpha > 0 and math.isfinite(self.alpha), "alpha", self.alpha, "a finite number above 0")
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        _check(len(self.targets) > 0, "targets", self.targets, "one pattern or more")
        for pattern in self.targets:
            try:
                matches(pattern, "")
            except re.error as error:
                raise RecipeError(
                    f"lora: pattern '{pattern}' is not a regular expression: {error}. Correct it."
                ) from None

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module, ABC):
    """A layer, and beside it two trained matrices A [r, n] and B [O, r]. What they see of the inputs is a subclass's.

    Args:
        base: the layer; its parameters are frozen here.
        num_inputs: n, the numbers that A sees.
        config: rank, strength and dropout; targets count for nothing.
        dtype: of A and B.
    """

    def __init__(self, base: Layer, num_inputs: int, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.config, self.scaling = base, config, config.scaling
        self.out_features, self.in_features = shape_of(base)
        base.requires_grad_(False)
        device = base.get_buffer("weight").device if isinstance(base, QuantizedLinear) else base.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, num_inputs, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, config.rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        """r."""
        return self.config.rank

    @property
    def weight(self) -> Tensor:
        """The base's; model code asks layers for its dtype and device."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return cast(Tensor | None, self.base.bias)

    def base_weight(self) -> Tensor:
        """Return the base's dense weight [O, I]; a packed one is decoded, in the model's dtype."""
        base = self.base
        return (
            base.site().dense(base.dtype) if isinstance(base, QuantizedLinear) else self.as_stored(base.weight.detach())
        )

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix [O, I] as the base stores its weight, or the other way round: GPT-2 stores [I, O]."""
        return matrix.T if isinstance(self.base, Conv1D) else matrix

    def product(self) -> Tensor:
        """Return scaling · B A [O, n], in the dtype of the adapter."""
        return self.scaling * (self.lora_b @ self.lora_a)

    @abstractmethod
    def delta(self) -> Tensor:
        """Return what is added to the weight [O, I], in the dtype of the adapter."""

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


A = TypeVar("A", bound=Adapter)


class LoraLinear(Adapter):
    """W' = W + scaling · B A; the arguments are those of `Adapter`, with n = I."""

    def __init__(self, base: Layer, config: LoraConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, shape_of(base)[1], config, dtype)
        self.dropout = nn.Dropout(config.dropout)
        # In a tuple, so that neither the state nor the parameters of the model list it.
        self._original: tuple[nn.Parameter] | None = None

    @property
    def is_merged(self) -> bool:
        """Whether the base's weight holds the adapter at the moment."""
        return self._original is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., O] of inputs [..., I], in the dtype of the base's output."""
        result = frozen_linear(x, self.base) if isinstance(self.base, QuantizedLinear) else self.base(x)
        if self.is_merged:
            return result
        inner = functional.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a)
        return (result + functional.linear(inner, self.lora_b) * self.scaling).to(result.dtype)

    def delta(self) -> Tensor:
        """Return scaling · B A [O, I]."""
        return self.product()

    def merge(self) -> None:
        """Put the adapter into the base's weight, in float32 and rounded once.

        The original weight stays beside it, because a sum that was rounded cannot be undone: until `unmerge`, or until
        the adapter is dropped, both are in memory.

        Raises:
            RecipeError: the base is packed, or the adapter is merged already.
        """
        if isinstance(self.base, QuantizedLinear):
            raise RecipeError(
                f"lora: a weight packed in {self.base.scheme} cannot take an adapter in, since its codes would have to "
                "be chosen again. Merge into the dense model and quantize that, or train a group adapter on a "
                "-floatzero scheme, which folds into the zero points."
            )
        if self._original is not None:
            raise RecipeError("lora: this adapter is merged already. Unmerge it first.")
        weight = cast(nn.Parameter, self.base.weight)
        with torch.no_grad():
            changed = (weight.float() + self.as_stored(self.delta().float())).to(weight.dtype)
        self._original = (weight,)
        # A new parameter: a weight that another layer shares (a tied head) must not change there.
        self.base.weight = nn.Parameter(changed, requires_grad=False)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit; `merge` kept it.

        Raises:
            RecipeError: the adapter is not merged.
        """
        if self._original is None:
            raise RecipeError("lora: this adapter is not merged. There is nothing to undo.")
        (weight,) = self._original
        weight.data = weight.data.to(self.weight.device)
        self.base.weight, self._original = weight, None


def add_adapters(model: nn.Module, config: LoraConfig) -> dict[str, LoraLinear]:
    """Freeze the model and put an adapter around every target; in place. Return them by the names of the layers.

    Their random start is torch's global generator's.

    Raises:
        RecipeError: a pattern covers no layer, or the model has adapters.
        StructureError: the model has no decoder blocks.
    """
    return attach(model, select(model, config.targets), lambda _, base: LoraLinear(base, config))


def attach(model: nn.Module, names: Iterable[str], build: Callable[[str, Layer], A]) -> dict[str, A]:
    """Freeze the model and put what `build` makes of each named layer into its place.

    Raises:
        RecipeError: the model has adapters.
    """
    if existing := adapters_of(model):
        raise RecipeError(f"lora: {next(iter(existing))} has an adapter already. Merge or remove the adapters first.")
    layers = linear_layers(model)
    # Everything is built before anything is changed: an error leaves the model as it was.
    adapters = {name: build(name, layers[name]) for name in names}
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.train(model.training))
    return adapters


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters in a model by the names of their layers."""
    return {name: module for name, module in modules_of(model).items() if isinstance(module, Adapter)}


def remove_adapters(model: ModelT) -> ModelT:
    """Put the original layers back, in place, as they were before training; they stay frozen."""
    for name, adapter in adapters_of(model).items():
        if isinstance(adapter, LoraLinear) and adapter.is_merged:
            adapter.unmerge()
        model.set_submodule(name, adapter.base)
    return model


def merged(model: ModelT) -> ModelT:
    """Put every adapter into the weight of its layer and the plain layers back, in place; they stay frozen.

    Raises:
        RecipeError: an adapter stands around a packed layer; the model is unchanged.
    """
    adapters = adapters_of(model)
    for name, adapter in adapters.items():
        if not isinstance(adapter, LoraLinear) or isinstance(adapter.base, QuantizedLinear):
            raise RecipeError(
                f"{name}: its weight is packed and takes no adapter in. Merge into the dense model and quantize that, "
                "or train group adapters on a -floatzero scheme and fold them."
            )
    for name, adapter in adapters.items():
        if isinstance(adapter, LoraLinear) and not adapter.is_merged:
            adapter.merge()
        model.set_submodule(name, adapter.base)
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Numbers of one kind of module; a packed weight counts one per code."""

    num_trainable: int
    num_total: int

    @property
    def share(self) -> float:
        """Trainable among all; 0 where there is none."""
        return self.num_trainable / self.num_total if self.num_total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainableLedger:
    """What of a model is trained: by kind of module (adapter, linear, packed, embedding, other), and altogether."""

    kinds: Mapping[str, ParameterCount]

    @property
    def total(self) -> ParameterCount:
        """All kinds together."""
        return ParameterCount(
            num_trainable=sum(count.num_trainable for count in self.kinds.values()),
            num_total=sum(count.num_total for count in self.kinds.values()),
        )


def trainable_ledger(model: nn.Module) -> TrainableLedger:
    """Count the parameters of a model; tied ones count once, for the first module that has them."""
    kinds: dict[str, ParameterCount] = {}
    seen: set[int] = set()
    for module in modules_of(model).values():
        parameters = [each for each in module.parameters(recurse=False) if id(each) not in seen]
        seen |= {id(each) for each in parameters}
        num_codes = module.in_features * module.out_features if isinstance(module, QuantizedLinear) else 0
        if not parameters and not num_codes:
            continue
        kind = _kind(module)
        before = kinds.get(kind, ParameterCount(num_trainable=0, num_total=0))
        kinds[kind] = ParameterCount(
            num_trainable=before.num_trainable + sum(each.numel() for each in parameters if each.requires_grad),
            num_total=before.num_total + num_codes + sum(each.numel() for each in parameters),
        )
    return TrainableLedger(kinds=kinds)


def _kind(module: nn.Module) -> str:
    kinds = {
        Adapter: "adapter", QuantizedLinear: "packed", nn.Linear: "linear", Conv1D: "linear",
        nn.Embedding: "embedding",
    }  # fmt: skip
    return next((name for kind, name in kinds.items() if isinstance(module, kind)), "other")


def _check(holds: bool, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"lora: {key} must be {wanted}, not {value!r}.")
