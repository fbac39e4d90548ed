"""What quantization would make of a rotated model: products on rounded weights and inputs, with gradients.

Legend: O out features, I in features, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional

from bitwright.calibration.collect import SiteStats, observer_of
from bitwright.methods.model_task import InputQuantizerOf
from bitwright.methods.stage import FakeQuantize
from bitwright.model.products import Product
from bitwright.model.sites import Site, StorageKey, storage_key
from bitwright.numerics.inputs import InputTransform
from bitwright.numerics.ranges import minmax
from bitwright.numerics.ste import straight_through
from bitwright.recipe import Plan
from bitwright.schemes import ActivationScheme


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rounding:
    """Rounds as a plan says, to nearest.

    Attributes:
        plan: what is to become of each site.
        fake_quantize: rounds a weight.
        input_quantizer: rounds inputs, by their statistics.
        online: site -> what happens to its inputs at inference.
    """

    plan: Plan
    fake_quantize: FakeQuantize
    input_quantizer: InputQuantizerOf
    online: Mapping[str, InputTransform]

    def products(self, sites: Sequence[Site], weights: Mapping[str, Tensor]) -> dict[StorageKey, Product]:
        """Return what takes the place of the products with the weights of some sites.

        Args:
            sites: those that are quantized are rounded.
            weights: by parameter; the very tensors that the model runs on.
        """
        found: dict[StorageKey, Product] = {}
        for site in sites:
            entry = self.plan.sites[site.name]
            if entry.scheme is None:
                continue
            weight = weights[site.parameter]
            weight = weight if site.index is None else weight[site.index]
            weight = weight.T if site.transposed else weight
            change = self.online.get(site.name)
            coded = weight if change is None else change.to_weight(weight)
            # Ranges are chosen anew for every rotation that is tried, so that a search would take most of the time.
            coded = straight_through(coded, partial(self.fake_quantize, site, mean_square=None, method=minmax))
            product = partial(self._product, site, entry.scheme.activations, change, coded)
            found[storage_key(weight)] = product
        return found

    def _product(
        self,
        site: Site,
        acts: ActivationScheme | None,
        change: InputTransform | None,
        weight: Tensor,
        x: Tensor,
        added: Tensor | None,
    ) -> Tensor:
        x = x if change is None else change.apply(x)
        if acts is not None and x.numel():
            x = straight_through(x, partial(self._round_inputs, site, acts))
        out = functional.linear(x, weight)
        return out if added is None else out + added

    def _round_inputs(self, site: Site, acts: ActivationScheme, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        stats = SiteStats()
        if acts.observer is not None:
            stats.observers[acts] = observer_of(acts, site.in_features)
            stats.add(rows, with_gram=False)
        quantizer = self.input_quantizer(site, stats)
        assert quantizer is not None
        return quantizer.to(x.device).quantize(rows).dequantize().reshape(x.shape).to(x.dtype)
