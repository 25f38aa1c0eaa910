"""What is done with pictures that show another one of their set again (``--near_duplicates``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.duplicates import Fingerprints, earlier_twins, matches
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


def handle_heldout_twins(
    heldout: Sequence[Scanned], train: Sequence[Scanned], policy: str, state: PartialState, log: Log
) -> tuple[list[Scanned], list[Skipped]]:
    """The held-out pictures that stay, and those that don't, since they are training pictures. All processes call it.

    Equal pixels are found under every ``policy``; recompressed, resized and mirrored ones where both have fingerprints. A
    held-out loss that is measured on training pictures falls while they are learnt by heart.

    Raises:
        StoreError: any of them, where they are to be refused.
    """
    reasons = _heldout_twins(heldout, train, state)
    found = [p for p in heldout if p.content in reasons]
    if not found:
        return list(heldout), []
    first = f"{found[0].record.name}: {reasons[found[0].content]}"
    what = f"{len(found)} of {len(heldout)} held-out images are training images, the first is {first}"
    if policy == "refuse":
        raise StoreError(f"--near_duplicates refuse: {what}. Remove them, or use drop or report")
    if policy != "drop":
        log(
            f"warning: {what}. The held-out loss falls while these are learnt by heart, so --early_stopping means nothing "
            "for them (--near_duplicates drop leaves them out)"
        )
        return list(heldout), []
    stays = [p for p in heldout if p.content not in reasons]
    if not stays:
        raise StoreError(f"--heldout_data_dir: {what}; nothing is held out")
    log(f"note: {what}; they are left out")
    return stays, [{"file": p.record.name, "reason": reasons[p.content]} for p in found]


def _heldout_twins(heldout: Sequence[Scanned], train: Sequence[Scanned], state: PartialState) -> dict[str, str]:
    """Content of each held-out picture that is a training picture → which, and in what."""
    same = {p.content: p.record.name for p in reversed(train)}
    reasons = {p.content: f"the same pixels as {same[p.content]}" for p in heldout if p.content in same}
    left = list({p.content: p for p in heldout if p.content not in same and p.print}.values())
    known = list({p.content: p for p in train if p.print}.values())
    near: dict[str, str] = {}
    if state.is_main_process and left and known:
        for i, j, mirrored in matches(_fingerprints(left), _fingerprints(known)):
            reason = f"near-duplicate of {known[j].record.name}{' (mirrored)' if mirrored else ''}"
            near.setdefault(left[i].content, reason)
    return {**reasons, **(gather_object([near])[0] if state.num_processes > 1 else near)}


def _fingerprints(pictures: Sequence[Scanned]) -> Fingerprints:
    prints = np.frombuffer(b"".join(p.print or b"" for p in pictures), np.uint8)
    return Fingerprints.of(prints.reshape(len(pictures), -1))


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
        for i, j, mirrored in earlier_twins(_fingerprints(distinct), kept_only=dropping):
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
