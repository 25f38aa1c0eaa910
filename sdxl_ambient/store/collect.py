"""Opens every picture of a source, or every latent that is noisy already, and sorts out which can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sdxl_ambient.errors import ImagesMissing
from sdxl_ambient.images.colour import UNREADABLE
from sdxl_ambient.images.folder import Ledger
from sdxl_ambient.images.load import Listing, Record
from sdxl_ambient.images.sources import TRAIN, Log, open_records
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.models.vae import check_geometry
from sdxl_ambient.store.deduplicate import MAXIMUM_REPORTED, handle_heldout_twins, handle_near_duplicates
from sdxl_ambient.store.lineage import refuse_restored
from sdxl_ambient.store.prenoised import list_latents, scan_latent
from sdxl_ambient.store.records import Skipped, Twin
from sdxl_ambient.store.scan import Check, Scanned, scan, scan_image, scan_image_with_hash
from sdxl_ambient.store.settings import StoreSettings


@dataclass(frozen=True)
class Collected:
    """The usable pictures of a source, what was left out of it, and its near-duplicates; None where none were looked for."""

    listing: Listing  # all of the source
    pictures: list[Scanned]
    skipped: list[Skipped]
    twins: list[Twin] | None = None

    @property
    def files(self) -> int:
        """How many pictures the source has, usable or not."""
        return len(self.listing)

    @property
    def profiles(self) -> Counter[str]:
        """How many pictures were converted from each colour profile."""
        return Counter(p.profile for p in self.pictures if p.profile is not None)

    def ledger(self) -> dict[str, Any]:
        """What became of every file of the source, as the manifest keeps it."""
        record = self.listing.ledger.record(len(self.pictures), len(self.skipped))
        return {**record, "profiles": dict(sorted(self.profiles.items()))}

    @property
    def records(self) -> dict[str, Record]:
        """The first record of each picture, by the hash of its pixels."""
        return {p.content: p.record for p in reversed(self.pictures)}


def collect(
    train_data_dir: str | Path | None,
    encoders: Encoders,
    settings: StoreSettings,
    state: PartialState,
    log: Log,
    check: Check,
    prints: bool = False,
) -> Collected:
    """Open every picture, or every latent that is noisy already, and sort out which can be used.

    Args:
        prints: whether pictures get perceptual fingerprints though no near-duplicates are looked for among them.

    Raises:
        ImagesMissing: nothing that can be used, or broken metadata.
        StoreError: near-duplicates that are to be refused, or restored samples in place of observations.
        ModelError: sizes that the model can't have.
    """
    if train_data_dir is not None:
        refuse_restored("train_data_dir", train_data_dir)
    if settings.pre_noised:
        collected = _collect_latents(train_data_dir, settings, state, log, check)
    else:
        check_geometry(settings.geometry, encoders.vae)
        collected = _collect_pictures(train_data_dir, settings, state, log, check, prints)
    report_skipped(collected.skipped, collected.files, log)
    report_profiles(collected.profiles, log)
    if not collected.pictures:
        raise ImagesMissing(
            f"none of the {collected.files} images in {str(train_data_dir or settings.dataset_name)!r} can be used: "
            f"{collected.skipped[0]['reason']}"
        )
    return collected


def _collect_latents(
    folder: str | Path | None, settings: StoreSettings, state: PartialState, log: Log, check: Check
) -> Collected:
    if folder is None:
        raise ImagesMissing("--pre_noised: needs a folder of noisy latents")
    listing = list_latents(folder, settings.t_n, settings.columns)
    report_ledger(listing.ledger, folder, log)
    for parent in sorted({record.path.parent for record in listing}):
        refuse_restored("train_data_dir", parent)
    return Collected(listing, *scan(listing, settings.instance_prompt, state, scan_latent, check))


def _collect_pictures(
    folder: str | Path | None, settings: StoreSettings, state: PartialState, log: Log, check: Check, prints: bool
) -> Collected:
    source = settings.dataset or folder
    if source is None:
        raise ImagesMissing("no folder of images and no data set is given")
    split = settings.dataset_split if settings.dataset is None else TRAIN
    listing = open_records(source, settings.columns, split=split, state=state, log=log)
    report_ledger(listing.ledger, str(folder), log)
    # Perceptual hashes cost a second look at each picture.
    scan_one = scan_image_with_hash if prints or settings.near_duplicates != "ignore" else scan_image
    pictures, skipped = scan(listing, settings.instance_prompt, state, scan_one, check)
    pictures, dropped, twins = handle_near_duplicates(pictures, settings.near_duplicates, state, log)
    return Collected(listing, pictures, [*skipped, *dropped], twins)


def apart(heldout: Collected, train: Collected, policy: str, state: PartialState, log: Log) -> Collected:
    """Held-out pictures without those that are training pictures, as ``--near_duplicates`` says."""
    pictures, dropped = handle_heldout_twins(heldout.pictures, train.pictures, policy, state, log)
    return replace(heldout, pictures=pictures, skipped=[*heldout.skipped, *dropped])


# -- reports ------------------------------------------------------------------


def report_skipped(skipped: Sequence[Skipped], total: int, log: Log) -> None:
    """Count the skipped files, and name the first ones."""
    if not skipped:
        return
    log(f"{len(skipped)} of {total} images are skipped:")
    for entry in skipped[:MAXIMUM_REPORTED]:
        log(f"  {entry['file']}: {entry['reason']}")
    if len(skipped) > MAXIMUM_REPORTED:
        log(f"  … and {len(skipped) - MAXIMUM_REPORTED} more, all listed in manifest.json")


def report_profiles(profiles: Counter[str], log: Log) -> None:
    """Say how many pictures were converted to sRGB, and of which the profile could not be read."""
    for name, count in sorted(profiles.items()):
        if name == UNREADABLE:
            log(f"note: {count} images have a colour profile that can't be read, and are taken for sRGB")
        else:
            log(f"note: {count} images are converted to sRGB from the colour profile {name!r}")


def report_ledger(ledger: Ledger, source: str | Path, log: Log) -> None:
    """The sums over every file of a folder, and why some are not read."""
    if ledger.files:
        for line in ledger.lines(source):
            log(line)
