"""What a model weighs and computes, known from its shapes alone: no weight is read, and none need exist.

A configuration is enough, because the model is built on torch's meta device. Where there is a checkpoint, its own names
and dtypes are used, which a configuration does not tell for every tensor.

Of a mixture of experts every weight is stored, and a token meets only the experts that the router chooses.
`ModelShape.share` is what it meets of a site, as if the router chose evenly. Real ones do not quite, so a batch wakes
somewhat fewer experts than the expected number.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.model.sites import Site, block_sites, find_blocks
from bitwright.model.skeleton import CONSTRUCTION_ERRORS
from bitwright.model.stream import StreamedModel
from bitwright.recipe import Recipe, SitePlan, resolve
from bitwright.schemes import Scheme

DEFAULT_DTYPE = torch.bfloat16
"""Of a configuration that does not name one."""
_ROUTED_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "moe_topk", "num_selected_experts", "top_k_experts")
_EXPERT_MODULE = re.compile(r"(?P<place>.+)\.(?P<number>\d+)(?:\.|$)")
"""An expert that is a module of its own, in a list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Name, shape and dtype of a tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """What one layer remembers of each token.

    Attributes:
        values_per_token: numbers kept per token: keys and values of all heads, or what they are computed from.
        window: tokens after which the oldest are forgotten; None keeps all.
    """

    values_per_token: int
    window: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        name: for people.
        block_names: of the decoder blocks, in order.
        sites: every weight site of every block.
        site_dtypes: of each site's weight as it is stored, by the name of the site.
        kept: every other stored tensor: embeddings, norms, biases, head.
        dtype: of the model, to which packed weights decode.
        num_parameters: all of them, tied ones once.
        num_active_parameters: those that one token meets: all but the experts that it is not sent to. Embeddings count
            whole, as on most model cards.
        head_bytes: of the matrix that makes logits of a hidden state, in its own dtype; counts where it is tied too.
        head_weights: elements of that matrix.
        caches: of each layer that attends to earlier tokens.
        hidden_size: numbers per token between blocks.
        attention_width: numbers per token in the queries of one layer, or the mean of these and its outputs where keys
            and values differ in width; the mean of all layers where these differ.
        widest: numbers per token inside a block at once, at most.
        vocab_size: logits per token.
        max_context: tokens the model was made for; None if its configuration does not say.
        routed: experts that a token goes through, of how many; None for a dense model.
        ranks: site -> rank of the low-rank addend that it gets if it is quantized; only bitwright's layout holds one.
    """

    name: str
    block_names: tuple[str, ...]
    sites: tuple[Site, ...]
    site_dtypes: Mapping[str, torch.dtype]
    kept: tuple[StoredTensor, ...]
    dtype: torch.dtype
    num_parameters: int
    num_active_parameters: int
    head_bytes: int
    head_weights: int
    caches: tuple[LayerCache, ...]
    hidden_size: int
    attention_width: int
    widest: int
    vocab_size: int
    max_context: int | None
    routed: tuple[int, int] | None
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])

    def share(self, site: Site) -> float:
        """Return the part of all tokens that reach a site: those sent to an expert, and every token elsewhere."""
        if site.kind != "expert" or self.routed is None:
            return 1.0
        chosen, experts = self.routed
        return chosen / experts

    def in_dtype(self, dtype: torch.dtype, *, packed: Collection[str] = ()) -> "ModelShape":
        """Return the model as it is when it is loaded in another dtype, but for sites whose codes stay packed."""
        return replace(
            self, dtype=dtype, head_bytes=self.head_weights * dtype.itemsize,
            kept=tuple(replace(t, dtype=dtype) if t.dtype.is_floating_point else t for t in self.kept),
            site_dtypes={name: each if name in packed else dtype for name, each in self.site_dtypes.items()},
        )  # fmt: skip

    def plan(self, assignment: "Mapping[str, Scheme | None]") -> dict[str, SitePlan]:
        """Return the assignment as a plan; a site that it does not name stays in 16 bit."""
        return {site.name: _entry(assignment.get(site.name)) for site in self.sites}

    def uniform(self, scheme: Scheme) -> dict[str, Scheme | None]:
        """Assign one scheme to every site that a recipe would quantize, with the group sizes that it would use.

        Raises:
            ShapeError: the groups fit some rows badly, as in a recipe.
        """
        plan = resolve(Recipe(scheme=scheme, ignore=()), self.sites)
        return {name: entry.effective for name, entry in plan.sites.items()}


def shape_of_model(model: StreamedModel) -> ModelShape:
    """Describe a checkpoint: its own names and dtypes; of packed weights those that they decode to."""
    skeleton, checkpoint = model.skeleton, model.skeleton.checkpoint
    sites = _sites(skeleton.model, model.block_names)
    of_sites = {stored_name for site in sites for stored_name in skeleton.sources[site.parameter]}
    return _shape(
        skeleton.model,
        str(checkpoint.path),
        model.block_names,
        sites=sites,
        site_dtypes={site.name: skeleton.stored_dtype(site.parameter) for site in sites},
        kept=tuple(
            StoredTensor(name=name, shape=checkpoint.shape(name), dtype=checkpoint.dtype(name))
            for name in checkpoint.names
            if name not in of_sites
        ),
        dtype=checkpoint.dense_dtype,
    )


def shape_of_config(source: str | Path, *, trust_remote_code: bool = False) -> ModelShape:
    """Describe the model that a configuration asks for: a config.json, its directory, or a hub id.

    Raises:
        CheckpointError: no configuration there, or transformers cannot build the model.
    """
    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else DEFAULT_DTYPE
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, experts_implementation="eager"
            )
    except (*CONSTRUCTION_ERRORS, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{source}: no model can be built from it ({reason}). Give a config.json or a model directory."
        ) from None
    _, block_names = find_blocks(model)
    sites = _sites(model, block_names)
    of_sites = {site.parameter for site in sites}
    tied = set(cast(Any, model).all_tied_weights_keys)
    state = cast(Mapping[str, torch.Tensor], model.state_dict())
    kept = tuple(
        StoredTensor(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in state.items()
        if name not in of_sites and name not in tied
    )
    return _shape(
        model,
        str(source),
        block_names,
        sites=sites,
        site_dtypes={site.name: state[site.parameter].dtype for site in sites},
        kept=kept,
        dtype=dtype,
    )


def _shape(
    model: nn.Module,
    name: str,
    block_names: list[str],
    *,
    sites: tuple[Site, ...],
    site_dtypes: Mapping[str, torch.dtype],
    kept: tuple[StoredTensor, ...],
    dtype: torch.dtype,
) -> ModelShape:
    config = cast(Any, model).config.get_text_config()
    head_weights = int(config.vocab_size) * int(config.hidden_size)
    routed = _routed(config, sites)
    max_context = getattr(config, "max_position_embeddings", None)
    return ModelShape(
        name=name,
        block_names=tuple(block_names),
        sites=sites,
        site_dtypes=site_dtypes,
        kept=kept,
        dtype=dtype,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_active_parameters=_num_active(model, sites, routed),
        head_bytes=head_weights * dtype.itemsize,
        head_weights=head_weights,
        caches=tuple(_caches(config)),
        hidden_size=int(config.hidden_size),
        attention_width=_attention_width(config),
        widest=_widest(block_names, sites, routed),
        vocab_size=int(config.vocab_size),
        max_context=None if max_context is None else int(max_context),
        routed=routed,
    )


def _sites(model: nn.Module, block_names: list[str]) -> tuple[Site, ...]:
    return tuple(site for name in block_names for site in block_sites(model.get_submodule(name), name))


def _entry(scheme: Scheme | None) -> SitePlan:
    group_size = None if scheme is None else scheme.weights.granularity.group_size
    return SitePlan(scheme=scheme, group_size=group_size, method=None, reason="")


def _widest(block_names: list[str], sites: tuple[Site, ...], routed: tuple[int, int] | None) -> int:
    """Outputs of all products of a token in one block; of the experts, only of those that it is sent to."""
    outputs = dict.fromkeys(block_names, 0)
    of_experts = dict.fromkeys(block_names, 0)
    for site in sites:
        block = next(each for each in block_names if site.name.startswith(each + "."))
        counted = of_experts if site.kind == "expert" else outputs
        counted[block] += site.out_features
    chosen, experts = routed or (1, 1)
    return max(outputs[block] + of_experts[block] * chosen // experts for block in block_names)


def _num_active(model: nn.Module, sites: tuple[Site, ...], routed: tuple[int, int] | None) -> int:
    """Parameters that one token meets; an expert's biases lie beside its weights and are chosen with them."""
    homes = {site.parameter.rpartition(".")[0] for site in sites if site.kind == "expert"}
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[name.rpartition(".")[0] in homes] += parameter.numel()
    chosen, experts = routed or (1, 1)
    return counts[False] + counts[True] * chosen // experts


def _caches(config: Any) -> Iterator[LayerCache]:
    """One entry per layer whose cache grows, as transformers would build it; a fixed state (linear attention) is none.

    Latent attention (MLA) keeps what keys and values are computed from.
    """
    for layer, cached in zip(_layers(config), DynamicCache(config=config).layers, strict=False):
        if isinstance(cached, DynamicLayer):
            heads = int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
            values = 2 * heads * _head_dim(layer)
            if latent := getattr(layer, "kv_lora_rank", None):
                values = int(latent) + int(layer.qk_rope_head_dim)
            yield LayerCache(values_per_token=values, window=getattr(cached, "sliding_window", None))


def _attention_width(config: Any) -> int:
    """Of a layer; the mean where layers differ."""
    layers = _layers(config)
    return sum(map(_attention_width_of, layers)) // len(layers)


def _attention_width_of(layer: Any) -> int:
    heads = int(layer.num_attention_heads)
    if getattr(layer, "kv_lora_rank", None):
        return heads * (int(layer.qk_nope_head_dim) + int(layer.qk_rope_head_dim) + int(layer.v_head_dim)) // 2
    return heads * _head_dim(layer)


def _head_dim(layer: Any) -> int:
    return int(getattr(layer, "head_dim", None) or int(layer.hidden_size) // int(layer.num_attention_heads))


def _layers(config: Any) -> Sequence[Any]:
    """The configuration of each layer: what differs between layers cannot be read from the whole's."""
    return getattr(config, "per_layer_config", None) or [config] * int(config.num_hidden_layers)


def _routed(config: Any, sites: tuple[Site, ...]) -> tuple[int, int] | None:
    """Return how many experts a token is sent to, of how many.

    Raises:
        BitwrightError: the configuration does not say, or layers differ.
    """
    experts = _experts_per_layer(sites)
    if not experts:
        return None
    per_layer = [
        next((found for key in _ROUTED_PER_TOKEN if (found := getattr(layer, key, None))), None)
        for layer in _layers(config)
    ]
    known = [each for each in per_layer if each is not None]
    name = type(config).__name__
    if not known:
        raise BitwrightError(
            f"{name}: has experts, and none of {', '.join(_ROUTED_PER_TOKEN)} says how many a token goes through. "
            "Costs of this model are not known."
        )
    chosen = {int(n) for each in known for n in (each if isinstance(each, (list, tuple)) else (each,))}
    if len(chosen) > 1 or len(experts) > 1:
        raise BitwrightError(
            f"{name}: layers have {sorted(experts)} experts, of which a token goes through {sorted(chosen)}. "
            "Costs are known only where all layers are alike."
        )
    return chosen.pop(), experts.pop()


def _experts_per_layer(sites: tuple[Site, ...]) -> set[int]:
    """Return how many experts a layer has; more than one number where layers differ."""
    numbers: dict[str, set[int]] = {}
    for site in sites:
        if site.kind != "expert":
            continue
        if site.index is not None:
            numbers.setdefault(site.parameter, set()).add(site.index)
        elif module := _EXPERT_MODULE.match(site.name):
            numbers.setdefault(module["place"], set()).add(int(module["number"]))
    return {len(each) for each in numbers.values()}
