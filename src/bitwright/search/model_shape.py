"""What a model weighs and computes, known from its shapes alone: no weight is read, and none need exist.

A configuration is enough, because the model is built on torch's meta device. Where there is a checkpoint, its own names
and dtypes are used, which a configuration does not tell for every tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.model.sites import Site, block_sites, find_blocks
from bitwright.model.skeleton import CONSTRUCTION_ERRORS
from bitwright.model.stream import StreamedModel
from bitwright.recipe import Recipe, SitePlan, resolve
from bitwright.schemes import Scheme

DEFAULT_DTYPE = torch.bfloat16
"""Of a configuration that does not name one."""
_ROUTED_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "num_selected_experts", "top_k_experts")


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
        head_bytes: of the matrix that makes logits of a hidden state, in its own dtype; counts where it is tied too.
        head_weights: elements of that matrix.
        caches: of each layer that attends to earlier tokens.
        hidden_size: numbers per token between blocks.
        attention_width: numbers per token in the queries of one layer.
        widest: numbers per token inside a block at once, at most.
        vocab_size: logits per token.
        max_context: tokens the model was made for; None if its configuration does not say.
        routed: experts that a token goes through, of how many; None for a dense model.
    """

    name: str
    block_names: tuple[str, ...]
    sites: tuple[Site, ...]
    site_dtypes: Mapping[str, torch.dtype]
    kept: tuple[StoredTensor, ...]
    dtype: torch.dtype
    num_parameters: int
    head_bytes: int
    head_weights: int
    caches: tuple[LayerCache, ...]
    hidden_size: int
    attention_width: int
    widest: int
    vocab_size: int
    max_context: int | None
    routed: tuple[int, int] | None

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
    """Describe a checkpoint: its own names and dtypes."""
    skeleton = model.skeleton
    stored = {
        name: StoredTensor(name=name, shape=info.shape, dtype=info.dtype)
        for name, info in skeleton.checkpoint.stored.items()
    }
    sites = _sites(skeleton.model, model.block_names)
    of_sites = {stored_name for site in sites for stored_name in skeleton.sources[site.parameter]}
    return _shape(
        skeleton.model,
        str(skeleton.checkpoint.path),
        model.block_names,
        sites=sites,
        site_dtypes={site.name: skeleton.stored_dtype(site.parameter) for site in sites},
        kept=tuple(tensor for name, tensor in sorted(stored.items()) if name not in of_sites),
        dtype=skeleton.checkpoint.dense_dtype,
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
    widest: dict[str, int] = {}
    for site in sites:
        if site.index in (None, 0):
            block = next(each for each in block_names if site.name.startswith(each + "."))
            widest[block] = widest.get(block, 0) + site.out_features
    max_context = getattr(config, "max_position_embeddings", None)
    return ModelShape(
        name=name,
        block_names=tuple(block_names),
        sites=sites,
        site_dtypes=site_dtypes,
        kept=kept,
        dtype=dtype,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        head_bytes=head_weights * dtype.itemsize,
        head_weights=head_weights,
        caches=tuple(_caches(config, len(block_names))),
        hidden_size=int(config.hidden_size),
        attention_width=int(config.num_attention_heads) * _head_dim(config),
        widest=max(widest.values()),
        vocab_size=int(config.vocab_size),
        max_context=None if max_context is None else int(max_context),
        routed=_routed(config, sites),
    )


def _sites(model: nn.Module, block_names: list[str]) -> tuple[Site, ...]:
    return tuple(site for name in block_names for site in block_sites(model.get_submodule(name), name))


def _entry(scheme: Scheme | None) -> SitePlan:
    group_size = None if scheme is None else scheme.weights.granularity.group_size
    return SitePlan(scheme=scheme, group_size=group_size, method=None, reason="")


def _caches(config: Any, num_layers: int) -> Iterator[LayerCache]:
    """One entry per layer with attention; layers of a fixed state (linear attention, convolution) grow no cache."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    values = 2 * heads * _head_dim(config)
    if latent := getattr(config, "kv_lora_rank", None):
        values = int(latent) + int(getattr(config, "qk_rope_head_dim", 0))
    kinds = cast(list[str], getattr(config, "layer_types", None) or ["full_attention"] * num_layers)
    window = getattr(config, "sliding_window", None)
    for kind in kinds[:num_layers]:
        if kind.endswith("attention") and not kind.startswith("linear"):
            yield LayerCache(values_per_token=values, window=int(window) if window and "full" not in kind else None)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or int(config.hidden_size) // int(config.num_attention_heads))


def _routed(config: Any, sites: tuple[Site, ...]) -> tuple[int, int] | None:
    experts = {site.index for site in sites if site.kind == "expert" and site.index is not None}
    if not experts:
        return None
    chosen = next((int(getattr(config, key)) for key in _ROUTED_PER_TOKEN if getattr(config, key, None)), None)
    if chosen is None:
        raise BitwrightError(
            f"{type(config).__name__}: has experts, and none of {', '.join(_ROUTED_PER_TOKEN)} says how many a token "
            "goes through. Costs of this model are not known."
        )
    return chosen, len(experts)
