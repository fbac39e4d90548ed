"""A Hugging Face model directory, read lazily: headers at once, tensors when asked for, never a pickle.

A checkpoint whose weights are already packed in compressed-tensors' `pack-quantized` layout reads as the dense model
it stands for, so that evaluation, verification and the report use one code path for originals and results.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.model import packed

WEIGHT_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py"]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
        self.stored = _scan_headers(path)
        quantization = config.get("quantization_config")
        self._packing = packed.Packing.from_config(quantization, path) if quantization else None
        packed_weights = self._packing.weights(self.stored) if self._packing else {}
        components = {part for parts in packed_weights.values() for part in parts}
        self._packed_weights = packed_weights
        self.names: list[str] = sorted([name for name in self.stored if name not in components] + list(packed_weights))

    @property
    def is_packed(self) -> bool:
        """Whether the model is quantized (compressed-tensors pack-quantized)."""
        return self._packing is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor `name`."""
        if name in self._packed_weights:
            return tuple(self.read_stored([f"{name}_shape"])[f"{name}_shape"].tolist())
        return self.stored[name].shape

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read dense tensors into fresh memory; packed weights are dequantized to their scale's dtype."""
        wanted = list(names)
        plain = [name for name in wanted if name not in self._packed_weights]
        tensors = self.read_stored(plain)
        for name in wanted:
            if name in self._packed_weights:
                tensors[name] = self.read_packed(name).dequantize(self.stored[f"{name}_scale"].dtype)
        return tensors

    def read_packed(self, name: str) -> "packed.QTensor":
        """Read the packed weight stored for the dense tensor `name`."""
        assert self._packing is not None
        return self._packing.decode(name, self.read_stored(self._packed_weights[name]))

    def packed_names(self) -> list[str]:
        """Dense names of the packed weights."""
        return sorted(self._packed_weights)

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
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise CheckpointError(
                    f"{self.stored[name].file}: {name} holds {bad} values that are NaN or Inf. "
                    "The checkpoint is damaged; obtain it again."
                )
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            progress(self.stored[name].num_bytes)
        return digest.hexdigest()


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


def _scan_headers(path: Path) -> dict[str, TensorInfo]:
    files = _weight_files(path)
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
