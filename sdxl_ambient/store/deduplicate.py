"""What is done with pictures that show another one of their set again (``--near_duplicates``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.duplicates import Fingerprints, earlier_twins
from sdxl_ambient.images.sources import Log
from sdxl_ambient.store.records import Skipped, Twin
from sdxl_ambient.store.scan import Scanned

MAXIMUM_REPORTED = 20


def handle_near_duplicates(
    pictures: Sequence[Scanned], policy: str, state: PartialState, log: Log
) -> tuple[list[Scanned], list[Skipped], list[Twin] | None]:
    """The pictures that stay, those that don't, and all near-duplicates.

    Args:
        policy: "report", "drop" (of pictures that show the same, the first in the order of the files stays), "refuse", or
            "ignore", for which they are not looked for, and are None.

    Raises:
        StoreError: any of them, or an exact copy, where they are to be refused.
    """
    if policy == "ignore":
        return list(pictures), [], None
    twins, copies = _find(pictures, policy == "drop", state), _copies(pictures)
    if copies and policy == "refuse" and not twins:
        raise StoreError(
            f"--near_duplicates refuse: {len(copies)} files are exact copies, the first is {copies[0]}. Remove them, or use "
            "drop or report"
        )
    if copies and policy != "refuse":
        log(f"note: {len(copies)} files are exact copies, the first is {copies[0]}; each picture is drawn once")
    if policy == "drop":
        return *_without(pictures, twins), twins
    if twins and policy == "refuse":
        raise StoreError(
            f"--near_duplicates refuse: {len(twins)} images show another one again, the first is {twins[0]['file']}: "
            f"{_reason(twins[0])}. Remove them, or use drop or report"
        )
    _report(twins, log)
    return list(pictures), [], twins


def _copies(pictures: Sequence[Scanned]) -> list[str]:
    """Files with the pixels of an earlier one. They are one picture in every store, drawn once, with all their captions."""
    first: dict[str, Scanned] = {}
    copies = []
    for picture in pictures:
        one = first.setdefault(picture.content, picture)
        if one is not picture:
            copies.append(f"{picture.record.name} of {one.record.name}")
    return copies


def _find(pictures: Sequence[Scanned], dropping: bool, state: PartialState) -> list[Twin]:
    """Pictures that show an earlier one again, each once. The main process compares them, all get its result."""
    twins: list[Twin] = []
    if state.is_main_process and pictures:
        distinct = list({p.content: p for p in reversed(pictures)}.values())[::-1]
        prints = np.frombuffer(b"".join(p.print or b"" for p in distinct), np.uint8).reshape(len(distinct), -1)
        for i, j, mirrored in earlier_twins(Fingerprints.of(prints), kept_only=dropping):
            later, earlier = distinct[i], distinct[j]
            twins.append(
                {"file": later.record.name, "shows": earlier.record.name, "mirrored": mirrored, "content": later.content}
            )
    return gather_object([twins])[0] if state.num_processes > 1 else twins


def _reason(twin: Twin) -> str:
    return f"near-duplicate of {twin['shows']}{' (mirrored)' if twin['mirrored'] else ''}"


def _without(pictures: Sequence[Scanned], twins: Sequence[Twin]) -> tuple[list[Scanned], list[Skipped]]:
    """Exact copies of a picture go with it."""
    reasons = {t["content"]: _reason(t) for t in twins}
    dropped: list[Skipped] = [
        {"file": p.record.name, "reason": reasons[p.content]} for p in pictures if p.content in reasons
    ]
    return [p for p in pictures if p.content not in reasons], dropped


def _report(twins: Sequence[Twin], log: Log) -> None:
    if not twins:
        return
    log(
        f"note: {len(twins)} images show another one again; two noisy latents of one picture tell more of it than t_n "
        "promises (--near_duplicates drop leaves them out):"
    )
    for twin in twins[:MAXIMUM_REPORTED]:
        log(f"  {twin['file']}: {_reason(twin)}")
    if len(twins) > MAXIMUM_REPORTED:
        log(f"  … and {len(twins) - MAXIMUM_REPORTED} more, all listed in manifest.json")
