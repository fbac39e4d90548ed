"""AutoRound: rounding learned by signed gradients, block by block. https://github.com/intel/auto-round

`signround` is `AutoRound` as it is: 200 iterations, batches of 8, symmetric. `signround-v2` adds `enable_alg_ext`, and
`signround-best` is the recipe of its command `auto-round-best`: 1000 iterations. `rtn` is its recipe without tuning,
`opt-rtn` the one that searches scales weighted by an importance matrix. All of them see the same windows.

What is judged are the codes that it exports: scales are stored in float16, and zero points in as many bits as codes.
"""

from typing import Any

from common import BUDGETS, Job, PeerError, Quantized, decoded, decoder_linears, main

RECIPES: dict[str, dict[str, Any]] = {
    "signround": {"iters": 200},
    "signround-asym": {"iters": 200},
    "signround-v2": {"iters": 200, "enable_alg_ext": True},
    "signround-best": {"iters": 1000},
    "signround-best-v2": {"iters": 1000, "enable_alg_ext": True},
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "opt-rtn": {"iters": 0, "disable_opt_rtn": False},
}
SUPPORTED = dict.fromkeys(RECIPES, BUDGETS)


def quantize(job: Job) -> Quantized:
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    model = job.load()
    names = list(decoder_linears(model))
    symmetric = not job.method.endswith("-asym")
    scheme = {
        "bits": job.scheme.weight_bits, "group_size": job.scheme.group, "sym": symmetric, "data_type": "int",
        "act_bits": 16,
    }  # fmt: skip
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme=scheme,
        dataset=DataLoader(job.tokens, batch_size=8),
        seqlen=job.tokens.shape[1],
        nsamples=len(job.tokens),
        device_map="cpu",
        seed=job.seed,
        **RECIPES[job.method],
    )
    with job.clock:
        made, _ = tuner.quantize()
    layers = dict(made.named_modules())
    weights, bits = {}, 0
    for name in names:
        value, num_groups = decode(name, layers[name], job)
        weights.update([decoded(name, value)])
        bits += value.numel() * job.scheme.weight_bits + num_groups * (16 + job.scheme.weight_bits)
    return Quantized(weights=weights, bits=bits, settings={**scheme, **RECIPES[job.method]})


def decode(name: str, layer: Any, job: Job) -> tuple[Any, int]:
    """The weight that a layer's codes, scales and zero points give, in float32, and how many groups it has."""
    import torch

    weight = layer.weight.detach().float()
    num_rows = len(weight)
    scale = layer.scale.detach().float().reshape(num_rows, -1)
    half = 2 ** (job.scheme.weight_bits - 1)
    zero = layer.zp.detach().float() if isinstance(layer.zp, torch.Tensor) else torch.tensor(float(layer.zp))
    zero = zero.reshape(num_rows, -1) if zero.numel() > 1 else zero.reshape(1, 1)
    groups = weight.reshape(num_rows, scale.shape[1], -1)
    codes = torch.round(groups / scale[..., None] + zero[..., None])
    if codes.min() < 0 or codes.max() > 2 * half - 1:
        raise PeerError(f"{name}: codes from {codes.min():g} to {codes.max():g} are not {job.scheme.weight_bits} bits.")
    value = (codes - zero[..., None]) * scale.half().float()[..., None]
    # The layer holds the same in the model's dtype: one rounding of the weight and one of the scale away.
    limit = 2.0**-7 * groups.abs() + 1e-6
    if not ((value - groups).abs() <= limit).all():
        raise PeerError(f"{name}: the weight is not what its scales and zero points say.")
    return value.reshape(weight.shape), scale.numel()


if __name__ == "__main__":
    raise SystemExit(main("autoround", "auto-round", SUPPORTED, quantize))
