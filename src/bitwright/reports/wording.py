"""Figures as people read them: units, significant digits, and a word where there is no figure.

Digits are grouped with a narrow no-break space, sizes are decimal (1 MB = 10⁶ bytes), and a figure that was not
measured is an en dash, never a zero.
"""

import math

ABSENT = "–"
_THIN = "\u202f"
_SPACE = "\u00a0"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with that many significant digits; whole digits are never rounded away."""
    special = _special(value)
    if special is not None:
        return special
    assert value is not None
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}{_THIN}·{_THIN}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return fixed(value, max(0, digits - 1 - magnitude))


def fixed(value: float | None, decimals: int) -> str:
    """A plain number with that many decimals."""
    special = _special(value)
    return special if special is not None else f"{value:,.{decimals}f}".replace(",", _THIN).replace("-", "−")


def count(value: float | None) -> str:
    """A whole number of things."""
    return fixed(value, 0)


def with_stderr(value: float | None, stderr: float | None, digits: int = 2) -> str:
    """`value ± stderr`, both to the digits in which the standard error is known."""
    if value is None or stderr is None or not (math.isfinite(value) and math.isfinite(stderr)) or stderr <= 0:
        return number(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(stderr)))
    if decimals > 6:
        return f"{number(value)}{_SPACE}±{_SPACE}{number(stderr, digits)}"
    return f"{fixed(value, decimals)}{_SPACE}±{_SPACE}{fixed(stderr, decimals)}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """A fraction of 1 in percent."""
    special = _special(fraction)
    return special if special is not None else f"{fixed(100 * (fraction or 0.0), decimals)}{_SPACE}%"


def decibel(value: float | None) -> str:
    """A signal-to-noise ratio; None means that there is no error, or none was measured."""
    special = _special(value)
    return special if special is not None else f"{fixed(value, 1)}{_SPACE}dB"


def size(num_bytes: float | None) -> str:
    """Bytes in the largest decimal unit below them."""
    special = _special(num_bytes)
    if special is not None:
        return special
    assert num_bytes is not None
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{number(num_bytes / factor)}{_SPACE}{unit}"
    return f"{count(num_bytes)}{_SPACE}B"


def duration(seconds: float | None) -> str:
    """Seconds up to two minutes, then minutes and seconds, then hours and minutes."""
    special = _special(seconds)
    if special is not None:
        return special
    assert seconds is not None
    if seconds < 120:
        return f"{number(seconds, 2 if seconds < 10 else 3)}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s"
    return f"{minutes // 60}{_SPACE}h {minutes % 60:02d}{_SPACE}min"


def things(amount: float | None, singular: str, plural: str | None = None) -> str:
    """`1 site`, `35 sites`."""
    return f"{count(amount)} {singular if amount == 1 else plural or singular + 's'}"


def noise_share(sqnr_db: float) -> str:
    """What a signal-to-noise ratio says: the energy of the error as a share of the signal's."""
    share = 10.0 ** min(-sqnr_db / 10, 100.0)
    return f"{number(100 * share, 2)}{_SPACE}%"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _special(value: float | None) -> str | None:
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return None
