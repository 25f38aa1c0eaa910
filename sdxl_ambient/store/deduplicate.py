"""What is done with pictures that show another one of their set again (``--near_duplicates``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.duplicates import Fingerprints, earlier_twins
from sdxl_ambient.store.scan import Scanned

MAXIMUM_REPORTED = 20


def handle_near_duplicates(
    pictures: Sequence[Scanned], policy: str, state: PartialState, log
) -> tuple[list[Scanned], list[dict], list[dict] | None]:
    """The pictures that stay, ``{"file", "reason"}`` for those that don't, and all that was found.

    Args:
        policy: "report", "drop" (of pictures that show the same, the first in the order of the files stays), "refuse", or
            "ignore", for which nothing is looked for and None is found.

    Raises:
        StoreError: any of them, or an exact copy, where they are to be refused.
    """
    if policy == "ignore":
        return list(pictures), [], None
    found, copies = _find(pictures, policy == "drop", state), _copies(pictures)
    if copies and policy == "refuse" and not found:
        raise StoreError(
            f"--near_duplicates refuse: {len(copies)} files are exact copies, the first is {copies[0]}. Remove them, or use "
            "drop or report"
        )
    if copies and policy != "refuse":
        log(f"note: {len(copies)} files are exact copies, the first is {copies[0]}; each picture is drawn once")
    if policy == "drop":
        return *_without(pictures, found), found
    if found and policy == "refuse":
        raise StoreError(
            f"--near_duplicates refuse: {len(found)} images show another one again, the first is {found[0]['file']}: "
            f"{_reason(found[0])}. Remove them, or use drop or report"
        )
    _report(found, log)
    return list(pictures), [], found


def _copies(pictures: Sequence[Scanned]) -> list[str]:
    """Files with the pixels of an earlier one. They are one picture in every store, drawn once, with all their captions."""
    first, copies = {}, []
    for picture in pictures:
        one = first.setdefault(picture.content, picture)
        if one is not picture:
            copies.append(f"{picture.record.name} of {one.record.name}")
    return copies


def _find(pictures: Sequence[Scanned], dropping: bool, state: PartialState) -> list[dict]:
    """``{"file", "shows", "mirrored", "content"}`` of pictures that show an earlier one again, at most one for each.

    The main process compares them, all get what it finds.
    """
    found = []
    if state.is_main_process and pictures:
        distinct = list({p.content: p for p in reversed(pictures)}.values())[::-1]
        prints = np.frombuffer(b"".join(p.print for p in distinct), np.uint8).reshape(len(distinct), -1)
        for i, j, mirrored in earlier_twins(Fingerprints.of(prints), kept_only=dropping):
            names = {"file": distinct[i].record.name, "shows": distinct[j].record.name}
            found.append({**names, "mirrored": mirrored, "content": distinct[i].content})
    return gather_object([found])[0] if state.num_processes > 1 else found


def _reason(twin: dict) -> str:
    return f"near-duplicate of {twin['shows']}{' (mirrored)' if twin['mirrored'] else ''}"


def _without(pictures: Sequence[Scanned], twins: Sequence[dict]) -> tuple[list[Scanned], list[dict]]:
    """Exact copies of a picture go with it."""
    reasons = {t["content"]: _reason(t) for t in twins}
    dropped = [{"file": p.record.name, "reason": reasons[p.content]} for p in pictures if p.content in reasons]
    return [p for p in pictures if p.content not in reasons], dropped


def _report(twins: Sequence[dict], log) -> None:
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
