"""Which pictures can be used, and the hash that names them."""

from accelerate import PartialState
from PIL import Image

from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.store.scan import content_hash, scan


def test_content_is_the_pixels_not_the_file(tmp_path, photographs):
    image = load_rgb(photographs / "coffee.png")
    image.save(tmp_path / "copy.png", compress_level=1, pnginfo=None)
    assert (tmp_path / "copy.png").read_bytes() != (photographs / "coffee.png").read_bytes()
    assert content_hash(load_rgb(tmp_path / "copy.png")) == content_hash(image)
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert content_hash(changed) != content_hash(image)
    flat = Image.new("RGB", (8, 16)), Image.new("RGB", (16, 8))
    assert content_hash(flat[0]) != content_hash(flat[1])


def test_pictures_without_a_caption_are_skipped_unless_there_is_a_prompt(photographs, tmp_path):
    load_rgb(photographs / "coffee.png").save(tmp_path / "a.png")
    found, skipped = scan(list_images(tmp_path), None, PartialState())
    assert not found and skipped[0]["file"] == "a.png" and skipped[0]["reason"].startswith("no caption")
    found, skipped = scan(list_images(tmp_path), "a cup", PartialState())
    assert found[0].caption == "a cup" and not skipped
