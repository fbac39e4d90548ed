"""`import bitwright` is free: the command line answers at once, and torch comes only when there is work for it."""

import subprocess
import sys
import time

LIMIT_SECONDS = 0.3
ATTEMPTS = 10


def seconds(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def test_importing_the_package_loads_no_heavy_dependency() -> None:
    program = (
        "import sys, bitwright\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'plotly', 'pydantic'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_importing_the_package_takes_no_time() -> None:
    # The quickest of several attempts on either side, because a busy machine only ever adds to a time.
    baseline, imported = float("inf"), float("inf")
    for _ in range(ATTEMPTS):
        baseline = min(baseline, seconds("pass"))
        imported = min(imported, seconds("import bitwright"))
        if imported - baseline < LIMIT_SECONDS:
            return
    raise AssertionError(f"import bitwright takes {imported - baseline:.2f} s beyond Python's own {baseline:.2f} s")
