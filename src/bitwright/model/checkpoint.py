"""A Hugging Face model directory, read lazily: headers at once, tensors when asked for, never a pickle.

A checkpoint whose weights are already quantized, in bitwright's own layout or one of compressed-tensors', reads as the
dense model it stands for, so that evaluation, verification and the report use one code path for originals and results.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.model.layouts.stored import SAYS_SHAPE, StoredQuantization, from_config, module_of
from bitwright.numerics.inputs import QuantizedSite

WEIGHT_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py"]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where a stored tensor lies and what it is; read from the file's header only."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The tensors and the configuration of one model directory.

    `stored` maps the names in the files to their headers; `names` are the dense tensors that can be read (packed
    weights appear under the name of the dense weight).
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.stored = scan_headers(_weight_files(path))
        quantization = config.get("quantization_config")
        self._quantization: StoredQuantization | None = from_config(quantization, path) if quantization else None
        self._parts = self._quantization.weights(self.stored) if self._quantization else {}
        components = {part for parts in self._parts.values() for part in parts}
        self.names: list[str] = sorted([name for name in self.stored if name not in components] + list(self._parts))

    @property
    def is_packed(self) -> bool:
        """Whether the model is quantized."""
        return self._quantization is not None

    def require_original(self) -> None:
        """Raises CheckpointError for a model that is quantized already."""
        if self.is_packed:
            raise CheckpointError(f"{self.path}: the model is already quantized. Give the original.")

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the inputs of some sites are quantized."""
        return self._quantization is not None and self._quantization.quantizes_inputs

    @property
    def is_dense_equivalent(self) -> bool:
        """Whether every product of the model is one with a dense weight: no inputs quantized, no outputs corrected."""
        return not self.quantizes_inputs and not any(name.endswith(".output_correction") for name in self.stored)

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor `name`."""
        if self._quantization is None or name not in self._parts:
            return self.stored[name].shape
        shapes = {_leaf(part): self.stored[part].shape for part in self._parts[name]}
        says_shape = [part for part in self._parts[name] if part.endswith(SAYS_SHAPE)]
        small = {_leaf(part): tensor for part, tensor in self.read_stored(says_shape).items()}
        return self._quantization.shape(name, shapes, small)

    def file(self, name: str) -> Path:
        """Where the dense tensor `name`, or the first part of it, is stored."""
        return self.stored[self._parts[name][0] if name in self._parts else name].file

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the dense tensor `name`."""
        return self._dtype_of(name) if name in self._parts else self.stored[name].dtype

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype that quantized weights are dequantized to: the model's."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        found = next((dtype for dtype in _FLOATS if str(dtype) == f"torch.{named}"), None)
        if found is not None:
            return found
        counts = Counter(info.dtype for info in self.stored.values() if info.dtype in _FLOATS)
        return counts.most_common(1)[0][0] if counts else torch.float32

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read dense tensors into fresh memory; quantized weights are dequantized to the model's dtype."""
        wanted = list(names)
        plain = [name for name in wanted if name not in self._parts]
        tensors = self.read_stored(plain)
        for name in wanted:
            if name in self._parts:
                tensors[name] = self.read_packed(name).dense(self._dtype_of(name))
        return tensors

    def read_packed(self, name: str) -> QuantizedSite:
        """Read the quantized site stored for the dense tensor `name`."""
        assert self._quantization is not None
        stored = {_leaf(part): tensor for part, tensor in self.read_stored(self._parts[name]).items()}
        return self._quantization.decode(name, stored)

    def packed_names(self) -> list[str]:
        """Dense names of the quantized weights."""
        return sorted(self._parts)

    def _dtype_of(self, name: str) -> torch.dtype:
        """Engines dequantize to the dtype of the scales where these are plain floats."""
        scale = self.stored.get(f"{module_of(name)}.weight_scale")
        is_float = scale is not None and scale.dtype in _FLOATS and f"{module_of(name)}.weight_codes" not in self.stored
        return scale.dtype if scale is not None and is_float else self.dense_dtype

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they are stored. Copies, so that no file stays mapped into memory."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.stored[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, members in by_file.items():
            try:
                with safe_open(file, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                    for name in members:
                        tensors[name] = cast(Tensor, handle.get_tensor(name)).clone()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error}). Copy or download the file again.") from None
        return tensors

    def audit(self, progress: Callable[[int], None] = lambda _: None) -> str:
        """Read everything once: refuse NaN and Inf; return the content hash (sha256 of config and tensors)."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.stored):
            tensor = self.read_stored([name])[name]
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                bad = int((~torch.isfinite(tensor.float())).sum())
                raise CheckpointError(
                    f"{self.stored[name].file}: {name} holds {bad} values that are NaN or Inf. "
                    "The checkpoint is damaged; obtain it again."
                )
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            progress(self.stored[name].num_bytes)
        return digest.hexdigest()


def _leaf(stored_name: str) -> str:
    return stored_name.rpartition(".")[2]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a model directory, or download a hub id's safetensors.

    Raises:
        CheckpointError: missing directory, no config, pickle-only weights, missing shard, truncated or corrupt file.
    """
    path = Path(source)
    if not path.is_dir():
        path = _download(str(source))
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{path}: no config.json. Give the directory of a Hugging Face model.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{config_file}: not readable as JSON ({error}).") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file}: not a JSON object.")
    return Checkpoint(path, cast(dict[str, Any], config))


def _download(source: str) -> Path:
    looks_like_hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise CheckpointError(f"{source}: no such directory. Give a model directory or a hub id (organisation/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: no such directory, and no such model on the hub ({reason}).") from None


def scan_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Return what safetensors files hold, by name.

    Raises:
        CheckpointError: a file that is truncated, corrupt or holds a dtype that is not supported.
    """
    stored: dict[str, TensorInfo] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                for name in cast(list[str], list(handle.keys())):
                    view = handle.get_slice(name)
                    code = cast(str, view.get_dtype())
                    if code not in _DTYPES:
                        raise CheckpointError(f"{file}: {name} has dtype {code}, which is not supported.")
                    shape = tuple(cast(list[int], view.get_shape()))
                    stored[name] = TensorInfo(file=file, shape=shape, dtype=_DTYPES[code])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a valid safetensors file ({error}). It is truncated or corrupt; obtain it again."
            ) from None
    return stored


def _weight_files(path: Path) -> list[Path]:
    index_file = path / WEIGHT_INDEX
    if index_file.is_file():
        try:
            weight_map = cast(dict[str, str], json.loads(index_file.read_text(encoding="utf-8"))["weight_map"])
            files = [path / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index_file}: not a valid index ({error}). Copy or download it again.") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files)} weight shards missing, first {missing[0]}. Obtain them."
            )
        return files
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    loose = sorted(path.glob("*.safetensors"))
    if len(loose) == 1:
        return loose
    if loose:
        raise CheckpointError(f"{path}: {len(loose)} safetensors files but no {WEIGHT_INDEX}. Download the index too.")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when loaded and are refused. "
            "Convert them to safetensors with a tool you trust."
        )
    raise CheckpointError(f"{path}: no safetensors weights.")
