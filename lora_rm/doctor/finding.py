"""What a check found, and how it is said."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_rm.errors import Interrupted, LoraRmError, first_line

Status = Literal["ok", "warning", "fault", "unchecked"]
Kind = Literal["machine", "data", "base", "adapter", "merged", "run"]

NUM_PAIRS = 16
"""Pairs that a sound training learns by heart."""

NUM_SCORED = 64
"""Preferences scored both ways round."""

AGAIN = "Do what the message says, then run the doctor again."


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    status: Status
    """ok; warning: works, but may not be what is wanted; fault: mend it first; unchecked: and why."""

    found: str
    remedy: str = ""
    """What to do; empty if nothing."""

    value: float | None = None
    """The number that decided."""


def judge(
    check: str, found: str, remedy: str, *, fault: bool, warning: bool = False, value: float | None = None
) -> Finding:
    """A finding whose remedy is told only if something is wrong."""
    status: Status = "fault" if fault else "warning" if warning else "ok"
    value = None if value is None or not math.isfinite(value) else float(value)
    return Finding(
        check=check, status=status, found=found, remedy="" if status == "ok" else remedy, value=value
    )


def attempt(check: str, function: Callable[..., Finding], *arguments: Any) -> Finding:
    """A check's finding; a check that cannot be made is a fault with the reason."""
    try:
        return function(*arguments)
    except Interrupted:
        raise KeyboardInterrupt from None
    except torch.OutOfMemoryError:
        found = "the device has too little memory for this check"
        remedy = "Close other programs that use the device; `lora-rm plan` says what the model needs."
    except LoraRmError as error:
        found, remedy = str(error), AGAIN
    except Exception as error:  # a doctor that ends with a traceback helps nobody
        found = f"{type(error).__name__}: {first_line(error, 300)}"
        remedy = "This is not foreseen. The file may be damaged: make or fetch it again; if it stays, report this line."
    return Finding(check=check, status="fault", found=found, remedy=remedy)


def unchecked(check: str, why: str, remedy: str = "") -> Finding:
    """A check that was not made."""
    return Finding(check=check, status="unchecked", found=why, remedy=remedy)
