"""Files and data sets → RGB pictures with captions."""

from sdxl_ambient.images.captions import Columns, Description, read_descriptions
from sdxl_ambient.images.duplicates import Fingerprints, earlier_twins, fingerprint, matches
from sdxl_ambient.images.folder import Ledger, Unread, list_files
from sdxl_ambient.images.geometry import Geometry, Size, bucket_counts, mirrored, parse_buckets, size_of
from sdxl_ambient.images.load import Listing, Record, list_images, load_rgb
from sdxl_ambient.images.sources import HubDataset, open_records

__all__ = [
    "Columns",
    "Description",
    "Fingerprints",
    "Geometry",
    "HubDataset",
    "Ledger",
    "Listing",
    "Record",
    "Size",
    "Unread",
    "bucket_counts",
    "earlier_twins",
    "fingerprint",
    "list_files",
    "list_images",
    "load_rgb",
    "matches",
    "mirrored",
    "open_records",
    "parse_buckets",
    "read_descriptions",
    "size_of",
]
