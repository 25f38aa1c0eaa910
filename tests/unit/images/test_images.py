"""Pictures of every kind as a person sees them, and a reason for each one that can't be used."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data

from sdxl_ambient.errors import ImageError, ImagesMissing
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.load import list_images, load_rgb

COFFEE = data.coffee()[:200, :300]  # 200 high, 300 wide


def test_plain_pictures_keep_their_pixels(tmp_path):
    Image.fromarray(COFFEE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "a.png")), COFFEE)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    image = Image.fromarray(COFFEE)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "a.png")), np.rot90(COFFEE, turn))


def test_transparency_lies_on_white(tmp_path):
    alpha = np.zeros((200, 300, 1), np.uint8)
    alpha[:100], alpha[150:] = 255, 128
    Image.fromarray(np.concatenate([COFFEE, alpha], 2)).save(tmp_path / "rgba.png")
    got = np.asarray(load_rgb(tmp_path / "rgba.png")).astype(int)
    np.testing.assert_array_equal(got[:100], COFFEE[:100])
    assert (got[100:150] == 255).all()
    half = COFFEE[150:] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(got[150:] - half).max() <= 1


def test_grey_with_alpha_and_palette_with_transparency_lie_on_white(tmp_path):
    grey = np.full((20, 20), 40, np.uint8)
    alpha = np.where(np.arange(20)[:, None] < 10, 255, 0).astype(np.uint8) * np.ones((20, 20), np.uint8)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    palette = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 40, 40, 40])
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("la.png", "p.png"):
        got = np.asarray(load_rgb(tmp_path / name))
        assert got.shape == (20, 20, 3) and (got[:10] == 40).all() and (got[10:] == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    got = np.asarray(load_rgb(tmp_path / "a.png"))
    np.testing.assert_array_equal(got[..., 0], np.round(values / 257))
    assert (got[..., 0] == got[..., 2]).all()


def test_greyscale_one_bit_and_cmyk(tmp_path):
    camera = data.camera()[:64, :64]
    Image.fromarray(camera).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "grey.png")), np.stack([camera] * 3, 2))
    Image.fromarray(camera > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "bits.png"))[..., 1], (camera > 127) * 255)
    Image.fromarray(COFFEE).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    got = np.asarray(load_rgb(tmp_path / "cmyk.jpg")).astype(int)
    assert np.abs(got - COFFEE).mean() < 5


def make(path, kind):
    if kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "small":
        Image.new("RGB", (1, 1)).save(path, "PNG")
    elif kind == "narrow":
        Image.new("RGB", (100, 7)).save(path, "PNG")
    elif kind == "float":
        Image.fromarray(np.ones((20, 20), np.float32)).save(path, "TIFF")
    else:
        Image.fromarray(COFFEE).save(path, kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "not an image"),
        ("empty", "not an image"),
        ("small", "too small: 1x1 pixels, at least 8 on each side are needed"),
        ("narrow", "too small: 100x7 pixels"),
        ("float", "floating-point pixels"),
        ("PNG", "unreadable: "),
        ("JPEG", "unreadable: image file is truncated"),
    ],
)
def test_unusable_pictures_have_a_reason(tmp_path, kind, reason):
    make(tmp_path / "a.png", kind)
    with pytest.raises(ImageError, match=reason) as error:
        load_rgb(tmp_path / "a.png")
    assert "\n" not in str(error.value)


def test_bytes_and_open_files_are_pictures_too(tmp_path):
    Image.fromarray(COFFEE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_rgb((tmp_path / "a.png").read_bytes())), COFFEE)
    with open(tmp_path / "a.png", "rb") as file:
        np.testing.assert_array_equal(np.asarray(load_rgb(file)), COFFEE)
    with pytest.raises(ImageError, match="not an image"):
        load_rgb(b"this is no picture")


def test_missing_file_has_a_reason(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        load_rgb(tmp_path / "a.png")


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (30000, 20000)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="more than|too large"):
        load_rgb(tmp_path / "a.png")


def test_captions_come_from_metadata_and_text_files(emoji):
    (emoji / "sub").mkdir()
    for path, name in zip(sorted(emoji.glob("*.png"))[:2], ("sub/one.png", "sub/.hidden.png"), strict=True):
        (emoji / name).write_bytes(path.read_bytes())
    (emoji / "sub" / "one.txt").write_text(" from a file\n")
    (emoji / "notes.md").write_text("not a picture")
    records = list_images(emoji)
    assert len(records) == 7 and records == sorted(records, key=lambda r: r.path.relative_to(emoji).as_posix())
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    captions = {r.path.name: r.caption for r in records}
    assert captions == {**{row["file_name"]: row["text"] for row in rows}, "one.png": "from a file"}


def test_a_subfolders_metadata_counts_for_what_is_in_it(emoji):
    """As in ``load_dataset("imagefolder")``: data/train/metadata.jsonl; the one that stands nearest says it."""
    own = emoji / "train" / "more"
    own.mkdir(parents=True)
    paths = sorted(emoji.glob("*.png"))
    for path in paths[:2]:
        (own / path.name).write_bytes(path.read_bytes())
    rows = [{"file_name": f"more/{path.name}", "text": "outer"} for path in paths[:2]]
    (emoji / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (own / "metadata.csv").write_text(f"file_name,text\n{paths[1].name},inner\n")
    captions = {r.name: r.caption for r in list_images(emoji)}
    assert captions[f"train/more/{paths[0].name}"] == "outer" and captions[f"train/more/{paths[1].name}"] == "inner"
    assert len(captions) == 8 and all(captions.values())
    assert {r.caption for r in list_images(emoji / "train")} == {"outer", "inner"}
    (own / "metadata.csv").write_text("file_name,text\ngone.png,a\n")
    with pytest.raises(ImagesMissing, match="more/metadata.csv, line 2: 'gone.png' is not in the folder"):
        list_images(emoji)


def test_pictures_without_a_caption_have_none(emoji):
    (emoji / "metadata.jsonl").unlink()
    assert [r.caption for r in list_images(emoji)] == [None] * 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "line 3: not a JSON object with a 'file_name'"),
        (b'["a"]', "line 3: not a JSON object with a 'file_name'"),
        (b"7", "line 3: not a JSON object with a 'file_name'"),
        (b'{"text": "a"}', "line 3: not a JSON object with a 'file_name'"),
        (b'{"file_name": 5, "text": "a"}', "line 3: not a JSON object with a 'file_name'"),
        (b'{"file_name": "\xff.png"}', "is not UTF-8; save it as UTF-8, or say what it is with --caption_encoding"),
        (b'{"file_name": "gone.png", "text": "a"}', "line 3: 'gone.png' is not in the folder"),
        (b'{"file_name": "%s", "text": 5}', "line 3: 'text' is not a text or a list of texts: 5"),
        (b'{"file_name": "%s", "text": ["a", 5]}', "line 3: 'text' is not a text or a list of texts: ['a', 5]"),
    ],
)
def test_broken_metadata_is_named_with_its_line(emoji, line, message):
    lines = (emoji / "metadata.jsonl").read_bytes().splitlines()
    name = json.loads(lines[2])["file_name"].encode()
    lines[2] = line.replace(b"%s", name)
    (emoji / "metadata.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ImagesMissing) as error:
        list_images(emoji)
    assert message in str(error.value) and "metadata.jsonl" in str(error.value)


def test_line_separators_inside_a_caption_do_not_break_lines(emoji):
    names = sorted(p.name for p in emoji.glob("*.png"))
    rows = [json.dumps({"file_name": n, "text": "a\u2028b"}, ensure_ascii=False) for n in names]
    (emoji / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert {r.caption for r in list_images(emoji)} == {"a\u2028b"}


def test_a_wrong_caption_column_names_those_there_are(emoji):
    with pytest.raises(ImagesMissing, match=r"--caption_column: 'caption' is not one of: file_name, text \(.*emoji\)"):
        list_images(emoji, Columns("caption"))
    assert [r.captions for r in list_images(emoji, Columns("caption", captions_needed=False))] == [()] * 6
    next(emoji.glob("*.png")).with_suffix(".txt").write_text("metadata may say other things than captions")
    assert sum(bool(r.captions) for r in list_images(emoji, Columns("caption"))) == 1


def test_a_list_of_texts_is_several_captions(emoji):
    names = sorted(p.name for p in emoji.glob("*.png"))
    values = [["a", "b"], "c", [], None, ["", "d"], ["a", "a"]]
    rows = [json.dumps({"file_name": n, "text": v}) for n, v in zip(names, values, strict=True)]
    (emoji / "metadata.jsonl").write_text("\n".join(rows))
    assert [r.captions for r in list_images(emoji)] == [("a", "b"), ("c",), (), (), ("d",), ("a", "a")]


def as_csv(emoji, columns, *rows):
    """Metadata as a spreadsheet writes it, in place of metadata.jsonl; further fields are for the first pictures."""
    (emoji / "metadata.jsonl").unlink(missing_ok=True)
    names = sorted(p.name for p in emoji.glob("*.png"))
    lines = [",".join(["file_name", columns]), *(f"{name},{row}" for name, row in zip(names, rows, strict=False))]
    (emoji / "metadata.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")


def test_metadata_may_be_a_csv_file(emoji):
    as_csv(emoji, "text,level", '"one, two\nthree",300', "four,-1", "five,", ",7.0")
    records = list_images(emoji, Columns(t_n="level"))
    assert [r.captions for r in records] == [("one, two\nthree",), ("four",), ("five",), (), (), ()]
    assert [r.t_n for r in records] == [300, -1, None, 7, None, None]


def test_broken_csv_files_are_named(emoji):
    as_csv(emoji, "text", "a", "b,c")
    with pytest.raises(ImagesMissing, match=r"metadata\.csv, line 3: not a row with a 'file_name' and one field"):
        list_images(emoji)
    (emoji / "metadata.csv").write_text("name,text\na.png,b\n")
    with pytest.raises(ImagesMissing, match=r"csv: its first line names no 'file_name', or a column twice: name, text"):
        list_images(emoji)
    (emoji / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    with pytest.raises(ImagesMissing, match=r"metadata\.csv, line 2: byte 21 is not UTF-8; "):
        list_images(emoji)
    (emoji / "metadata.jsonl").write_text("")
    with pytest.raises(ImagesMissing, match="holds metadata.jsonl and metadata.csv; keep one of them"):
        list_images(emoji)


def test_pictures_have_noise_levels_of_their_own(emoji):
    names = sorted(p.name for p in emoji.glob("*.png"))
    values = [0, 998, -1, None, 500.0]
    rows = [json.dumps({"file_name": n, "text": "a", "level": v}) for n, v in zip(names, values, strict=False)]
    (emoji / "metadata.jsonl").write_text("\n".join(rows))
    assert [r.t_n for r in list_images(emoji, Columns(t_n="level"))] == [0, 998, -1, None, 500, None]
    assert [r.t_n for r in list_images(emoji)] == [None] * 6


@pytest.mark.parametrize("value", [999, -2, 1.5, True, "high", [1]])
def test_wrong_noise_levels_are_named_with_their_line(emoji, value):
    names = sorted(p.name for p in emoji.glob("*.png"))
    rows = [json.dumps({"file_name": n, "text": "a", "level": v}) for n, v in zip(names, [5, value], strict=False)]
    (emoji / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ImagesMissing) as error:
        list_images(emoji, Columns(t_n="level"))
    want = f"metadata.jsonl, line 2: --t_n_column: 'level' is {value!r}; allowed are 0 to 998, -1 for clean, and nothing"
    assert want in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_t_n_column_is_named(emoji):
    with pytest.raises(ImagesMissing, match=r"--t_n_column: 'level' is not one of: file_name, text \(.*emoji\)"):
        list_images(emoji, Columns(t_n="level"))
    (emoji / "metadata.jsonl").unlink()
    with pytest.raises(ImagesMissing, match="--t_n_column: 'level' needs a metadata.jsonl or metadata.csv in "):
        list_images(emoji, Columns(t_n="level"))


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ImagesMissing, match="nowhere' is not a folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ImagesMissing, match=r"holds no images, but nothing"):
        list_images(tmp_path)
