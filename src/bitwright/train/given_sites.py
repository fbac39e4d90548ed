"""Given sites: a folder of quantized sites that training made, for a quantization run to take in place of a solver's.

    sites.safetensors    <site>.<tensor>, the tensors of bitwright's own layout
    sites.json           {"version": 1, "schemes": {"<site>": "<scheme>"}}

The JSON is written last: a folder without it is not finished.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwright.errors import CheckpointError, RecipeError, UnknownName, did_you_mean
from bitwright.model.layouts import own
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.numerics.inputs import QuantizedSite
from bitwright.records import write_json_atomic
from bitwright.schemes import Scheme

TENSORS, SCHEMES = "sites.safetensors", "sites.json"
VERSION = 1


def write_given_sites(folder: Path, sites: Mapping[str, QuantizedSite], schemes: Mapping[str, Scheme]) -> None:
    """Write sites into a folder, which is made where it is missing; what it held before is replaced.

    Args:
        folder: where to.
        sites: by name.
        schemes: of each site, with the granularity that was really used.
    Raises:
        RecipeError: no scheme for a site, or one whose name reads as another scheme.
        ResourceError: the folder cannot be written.
    """
    names = {site: str(_scheme_of(site, schemes)) for site in sites}
    folder.mkdir(parents=True, exist_ok=True)
    # From here until the end the folder is unfinished, and readers can see it.
    (folder / SCHEMES).unlink(missing_ok=True)
    tensors: dict[str, Tensor] = {}
    for site, quantized in sites.items():
        for name, tensor in own.encode(quantized).items():
            # Grids may be views of, or share, one tensor, which the file format refuses.
            tensors[f"{site}.{name}"] = tensor.detach().cpu().clone()
    save_tensors_atomic(folder / TENSORS, tensors)
    write_json_atomic(folder / SCHEMES, {"version": VERSION, "schemes": names})


class GivenSites:
    """A folder of given sites, read when asked for.

    Attributes:
        schemes: of each site.
    Raises:
        CheckpointError: the folder is missing, unfinished, damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.schemes = _read_schemes(folder / SCHEMES)
        self._parts: dict[str, list[str]] = {site: [] for site in self.schemes}
        for name in self._stored_names():
            site = name.rpartition(".")[0]
            if site not in self._parts:
                raise CheckpointError(f"{folder}: tensor {name} belongs to no site. Write the folder again.")
            self._parts[site].append(name)

    def read(self, site: str) -> QuantizedSite:
        """Return one site.

        Raises:
            UnknownName: the folder has no such site.
            CheckpointError: the file cannot be read, or a tensor does not fit the scheme.
        """
        if site not in self.schemes:
            raise UnknownName(f"{self.folder}: no site '{site}'.{did_you_mean(site, self.schemes)}")
        stored: dict[str, Tensor] = {}
        try:
            with safe_open(self.folder / TENSORS, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                for name in self._parts[site]:
                    stored[name.rpartition(".")[2]] = cast(Tensor, handle.get_tensor(name)).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / TENSORS}: cannot be read ({error}). Write it again.") from None
        self._check(site, stored)
        return own.decode(self.schemes[site], stored)

    def _check(self, site: str, stored: Mapping[str, Tensor]) -> None:
        if "weight_shape" not in stored:
            raise CheckpointError(f"{self.folder}: {site} has no weight_shape. Write the folder again.")
        out_features, in_features = (int(n) for n in stored["weight_shape"])
        # The guard is the checkpoint's business; the check wants to see one.
        seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
        guard = own.guard(next(iter(own.STORED_DTYPES)))
        seen[own.GUARD] = (tuple(guard.shape), guard.dtype)
        own.check_stored(site, self.schemes[site], out_features, in_features, seen)

    def _stored_names(self) -> list[str]:
        try:
            with safe_open(self.folder / TENSORS, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                return list(cast(Any, handle).keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / TENSORS}: cannot be read ({error}). Write it again.") from None


def _scheme_of(site: str, schemes: Mapping[str, Scheme]) -> Scheme:
    if site not in schemes:
        raise RecipeError(f"{site}: no scheme is given for it.{did_you_mean(site, schemes)}")
    scheme = schemes[site]
    if Scheme.parse(str(scheme)) != scheme:
        raise RecipeError(f"{site}: scheme {scheme} has no name of its own. Use one that Scheme.parse gives.")
    return scheme


def _read_schemes(path: Path) -> dict[str, Scheme]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the folder is no finished folder of given sites.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Write the folder again.") from None
    if not isinstance(found, dict) or cast(dict[str, Any], found).get("version") != VERSION:
        raise CheckpointError(f"{path}: not version {VERSION} of given sites. Write the folder again.")
    return {site: Scheme.parse(name) for site, name in cast(dict[str, dict[str, str]], found)["schemes"].items()}
