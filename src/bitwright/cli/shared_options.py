"""Options that several commands have, written once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model directory or hub id.")]
Calibration = Annotated[str, typer.Option(help="Text file, JSONL, hub:NAME[:CONFIG[:SPLIT]] or stdlib.")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML recipe; options given here override it.")]
MaxKl = Annotated[float | None, typer.Option(help="Fail above this KL divergence, in nats per token.")]
FreshRun = Annotated[bool, typer.Option("--fresh", help="Discard what an earlier run left in --out.")]
Device = Annotated[str, typer.Option(help="Where blocks are computed: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Compute type: float32, bfloat16 or float16.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no tables.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")]
