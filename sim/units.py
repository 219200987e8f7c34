"""Base units, and the only place that knows others. Bytes, seconds, FLOP, watts, US dollars; ticks are picoseconds.

Sizes and rates enter as text with a unit ("80 GiB", "50 GB/s", "400 Gbit/s", "3 us") and leave as text for people.
Inside, a name carries its base unit: ``_bytes``, ``_s``, ``_bytes_per_s``, ``_flops``, ``_ticks``.
"""

from __future__ import annotations

import math
import re
from typing import NewType

Ticks = NewType("Ticks", int)
"""Simulated time in picoseconds. An integer, so that sums do not depend on their order."""

TICKS_PER_S = 10**12

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
_SIZE = re.compile(rf"^{_NUMBER}\s*([KMGTP]i|[kKMGTPE]?)B$")
_BYTE_RATE = re.compile(rf"^{_NUMBER}\s*([KMGTP]i|[kKMGTPE]?)B/s$")
_BIT_RATE = re.compile(rf"^{_NUMBER}\s*([kKMGTPE]?)bit/s$")
_FLOP_RATE = re.compile(rf"^{_NUMBER}\s*([kKMGTPE]?)FLOP/s$")
_DURATION = re.compile(rf"^{_NUMBER}\s*(ps|ns|us|ms|s|min|minutes?|h|hours?|days?|weeks?|years?)$")
_POWER = re.compile(rf"^{_NUMBER}\s*([kM]?)W$")
_FREQUENCY = re.compile(rf"^{_NUMBER}\s*([kMG]?)Hz$")
_MONEY = re.compile(rf"^(?:{_NUMBER}\s*([kMG]?)USD|\$\s*{_NUMBER}\s*([kMG]?))$")
_MONEY_RATE = re.compile(rf"^{_NUMBER}\s*([kMG]?)USD\s*/\s*(kWh|GPU|node|h|day|week|month|year|GB/month|TB/month)$")
_OTHER_CURRENCY = re.compile(
    r"[€£¥₩₹]|(?<![A-Za-z])[kMG]?(?:EUR|GBP|CNY|RMB|JPY|CHF|KRW|INR|CAD|AUD|SEK|SGD|TWD)(?![A-Za-z])"
)
_SECONDS = {
    "ps": 1e-12, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
    "min": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0,
    "day": 86400.0, "days": 86400.0, "week": 604800.0, "weeks": 604800.0, "year": 31536000.0, "years": 31536000.0,
}  # fmt: skip


def ticks(seconds: float) -> Ticks:
    """Return seconds as ticks, rounded up: nothing that takes time takes none."""
    return Ticks(math.ceil(seconds * TICKS_PER_S))


def seconds(t: int) -> float:
    """Return ticks as seconds."""
    return t / TICKS_PER_S


def _scale(prefix: str) -> int:
    return _BINARY[prefix] if prefix in _BINARY else _DECIMAL[prefix]


def parse_size(text: object) -> int:
    """Return bytes of a text such as "80 GiB" or "24 GB". Raises ValueError that says what to write."""
    found = _SIZE.match(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is not a size; write '80 GiB' (2^30) or '80 GB' (10^9)")
    return round(float(found[1]) * _scale(found[2]))


def parse_rate(text: object) -> float:
    """Return bytes per second of "50 GB/s" or "400 Gbit/s". Raises ValueError that says what to write."""
    if isinstance(text, str):
        if found := _BYTE_RATE.match(text.strip()):
            return float(found[1]) * _scale(found[2])
        if found := _BIT_RATE.match(text.strip()):
            return float(found[1]) * _scale(found[2]) / 8
    raise ValueError(f"{text!r} is not a rate; write '50 GB/s' (bytes) or '400 Gbit/s' (bits)")


def parse_flops(text: object) -> float:
    """Return FLOP per second of "989.4 TFLOP/s"."""
    found = _FLOP_RATE.match(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is not a rate of arithmetic; write '989.4 TFLOP/s'")
    return float(found[1]) * _scale(found[2])


def parse_duration(text: object) -> float:
    """Return seconds of "3 us", "90 days"."""
    found = _DURATION.match(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is not a duration; write '3 us', '12 h' or '90 days'")
    return float(found[1]) * _SECONDS[found[2]]


def parse_power(text: object) -> float:
    """Return watts of "700 W", "10.2 kW"."""
    found = _POWER.match(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is not a power; write '700 W' or '10.2 kW'")
    return float(found[1]) * _DECIMAL[found[2]]


def parse_frequency(text: object) -> float:
    """Return hertz of "1830 MHz"."""
    found = _FREQUENCY.match(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{text!r} is not a frequency; write '1830 MHz'")
    return float(found[1]) * _DECIMAL[found[2]]


def _in_dollars(text: object) -> str:
    """Return what to do with an amount in another currency, or nothing."""
    found = _OTHER_CURRENCY.search(text) if isinstance(text, str) else None
    return f": amounts are in US dollars, so convert {found[0]}" if found else ""


def parse_money(text: object) -> float:
    """Return US dollars of "2 MUSD", "35 kUSD", "250000 USD", "$2M"."""
    found = _MONEY.match(text.strip()) if isinstance(text, str) else None
    if found is None:
        what = "write '2 MUSD', '35 kUSD' or '250000 USD'"
        raise ValueError(f"{text!r} is not an amount of money; {what}{_in_dollars(text)}")
    return float(found[1] or found[3]) * _DECIMAL[found[2] or found[4] or ""]


def parse_money_per(text: object, per: str) -> float:
    """Return US dollars per ``per`` of "2.5 USD/h": the unit after the stroke has to be that one."""
    found = _MONEY_RATE.match(text.strip()) if isinstance(text, str) else None
    if found is None or found[3] != per:
        example = {"h": "2.50", "kWh": "0.08", "GPU": "30000", "node": "300000", "day": "10000", "year": "200000"}
        what = f"write '{example.get(per, '10')} USD/{per}'"
        raise ValueError(f"{text!r} is not a price per {per}; {what}{_in_dollars(text)}")
    return float(found[1]) * _DECIMAL[found[2]]


def format_money(usd: float) -> str:
    """Return US dollars for people: "1.24 MUSD", "812 USD"."""
    return f"{format_si(usd)}USD"


def format_energy(joules: float) -> str:
    """Return joules for people, in watt-hours: "812 MWh"."""
    return f"{format_si(joules / 3600)}Wh"


def format_power(watts: float) -> str:
    """Return watts for people: "1.31 MW"."""
    return f"{format_si(watts)}W"


def format_bytes(num_bytes: float) -> str:
    """Return bytes for people, binary: "71.3 GiB", "512 B"."""
    value, sign = abs(num_bytes), "-" if num_bytes < 0 else ""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if value < 1024:
            return f"{sign}{value:.0f} B" if not prefix else f"{sign}{_three(value)} {prefix}B"
        value /= 1024
    return f"{sign}{_three(value)} TiB"


def format_duration(seconds_: float) -> str:
    """Return seconds for people: "4.31 s", "812 us", "2.1 h"."""
    value, sign = abs(seconds_), "-" if seconds_ < 0 else ""
    if value == 0:
        return "0 s"
    if value >= 48 * 3600:
        return f"{sign}{_three(value / 86400)} days"
    if value >= 2 * 3600:
        return f"{sign}{_three(value / 3600)} h"
    if value >= 120:
        return f"{sign}{_three(value / 60)} min"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if value >= factor:
            return f"{sign}{_three(value / factor)} {unit}"
    return f"{sign}{_three(value / 1e-12)} ps"


def format_rate(bytes_per_s: float) -> str:
    """Return bytes per second for people, decimal: "362 GB/s"."""
    return f"{format_si(bytes_per_s)}B/s"


def format_flops(flops_per_s: float) -> str:
    """Return FLOP per second for people: "412 TFLOP/s"."""
    return f"{format_si(flops_per_s)}FLOP/s"


def format_si(value: float) -> str:
    """Return a number with a decimal prefix and a space: "362 G", "1.05 k", "12 "."""
    magnitude = abs(value)
    prefixes = ("", "k", "M", "G", "T", "P")
    index = 0
    while magnitude >= 1000 and index < len(prefixes) - 1:
        magnitude /= 1000
        index += 1
    return f"{'-' if value < 0 else ''}{_three(magnitude)} {prefixes[index]}"


def _three(value: float) -> str:
    """Three significant digits, no exponent, no trailing zeros lost ("4.30", "71.3", "812")."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
