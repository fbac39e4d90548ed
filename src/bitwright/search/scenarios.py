"""Where a model is to run, as data: what is usual there, and which schemes come into question."""

from dataclasses import dataclass

from bitwright.registry import Registry

Q8_WEIGHTS, Q8_BOTH, FP8, Q4, Q4_FINE, Q3, Q2 = (
    "W8A16-channel", "W8A8", "fp8", "W4A16-g128", "W4A16-g32", "W3A16-g128", "W2A16-g64"
)  # fmt: skip
NF4 = "nf4-b64-dq"
MENU = (Q8_WEIGHTS, Q8_BOTH, FP8, Q4, Q4_FINE, NF4, Q3, Q2, "ternary")
"""Every scheme that advice shows figures of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One place to run a model.

    Attributes:
        about: one line for people.
        hardware: profile taken unless another is named; None where devices differ too much.
        batch: sequences at once.
        context: tokens, unless the model was made for fewer.
        candidates: schemes to choose from, the most faithful first; the last resorts come in `smaller`.
        smaller: what remains where no candidate fits, in the order of trying.
    """

    about: str
    hardware: str | None
    batch: int
    context: int
    candidates: tuple[str, ...]
    smaller: tuple[str, ...] = ()


SCENARIOS: Registry[Scenario] = Registry("scenario")
SCENARIOS.register(
    "cloud",
    Scenario(
        about="many users at once on a server",
        hardware="h100-sxm",
        batch=16,
        context=4096,
        candidates=(FP8, Q8_BOTH, Q8_WEIGHTS, Q4),
    ),
)
SCENARIOS.register(
    "edge",
    Scenario(
        about="one user on an embedded computer",
        hardware="jetson-orin",
        batch=1,
        context=4096,
        candidates=(Q8_WEIGHTS, Q8_BOTH, Q4),
        smaller=(Q3, Q2),
    ),
)
SCENARIOS.register(
    "mobile",
    Scenario(
        about="one user on a phone or a laptop",
        hardware=None,
        batch=1,
        context=2048,
        candidates=(Q8_WEIGHTS, Q4_FINE),
        smaller=(Q3, Q2),
    ),
)
SCENARIOS.register(
    "iot",
    Scenario(
        about="a device with very little memory",
        hardware=None,
        batch=1,
        context=1024,
        candidates=(Q4,),
        smaller=(Q3, Q2, "ternary"),
    ),
)
SCENARIOS.register(
    "finetune",
    Scenario(
        about="training adapters on a frozen base (QLoRA)",
        hardware="rtx-4090",
        batch=1,
        context=2048,
        candidates=(NF4,),
    ),
)
