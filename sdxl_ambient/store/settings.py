"""What a store is made with."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.sources import HubDataset


@dataclass(frozen=True)
class StoreSettings:
    """How pictures become a store. Names and defaults are those of the options of ``python -m sdxl_ambient.latents``.

    Without pictures (``pre_noised``) the geometry, the key and near-duplicates are not looked at.
    """

    geometry: Geometry
    t_n: int | None = 500  # None for clean latents
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    caption_encoding: str | None = None
    t_n_column: str | None = None
    pre_noised: bool = False
    instance_prompt: str | None = None
    near_duplicates: str = "report"
    noise_key: str = "kept"
    noise_key_file: str | None = None
    allow_second_observation: bool = False
    shard_size: int = 256
    keep_tokens: bool = False  # the store holds the captions' tokens, too, which training text encoders needs

    @property
    def columns(self) -> Columns:
        """Which columns are read."""
        needed = not self.instance_prompt
        return Columns(self.caption_column, self.t_n_column, needed, self.image_column, self.caption_encoding)

    @property
    def dataset(self) -> HubDataset | None:
        """The data set that is read in place of a folder."""
        if self.dataset_name is None:
            return None
        return HubDataset(self.dataset_name, self.dataset_config_name, self.dataset_split)
