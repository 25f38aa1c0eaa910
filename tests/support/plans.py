"""Plans of stores that nothing is encoded for."""

from accelerate import PartialState

from sdxl_ambient.images.load import list_images
from sdxl_ambient.store.plan import make_plan
from sdxl_ambient.store.scan import scan

MARKS = {"latent": {"t_n": 500}, "text": {}}


def plan_of(folder, geometry, shard_size=2):
    pictures, skipped = scan(list_images(folder), None, PartialState())
    assert not skipped
    return pictures, {i["content"]: i for i in make_plan(MARKS, pictures, geometry, shard_size)["images"]}
