"""Every file of a folder is used, left out with its reason, or not read with its reason, and the three add up."""

import codecs
import io
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms
from skimage import data as photographs

from eval.images import read_folder
from sdxl_ambient.errors import ImageError, ImagesMissing
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.images.sources import open_records

PICTURE = Image.fromarray(photographs.astronaut()[:64, :64])


def save(path: Path, kind="PNG", picture=PICTURE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, kind, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """One good picture with its caption."""
    save(tmp_path / "images/good.png")
    (tmp_path / "images/good.txt").write_text("a good picture")
    return tmp_path / "images"


def ledger_of(folder, columns=None):
    listing = list_images(folder, columns)
    ledger = listing.ledger
    assert ledger.files == ledger.pictures + ledger.texts + ledger.not_read
    assert ledger.files == sum(len(files) for _, _, files in os.walk(folder)) + links(folder)
    assert ledger.pictures == len(listing)
    return listing, ledger


def links(folder):
    """Links to folders, which os.walk has among the folders."""
    return sum(p.is_symlink() and p.is_dir() for p in folder.rglob("*"))


# -- files ------------------------------------------------------------------------------------------------------------

HIDDEN, SYSTEM = "hidden", "kept by a system for itself"
PICTURES = {
    "a.jpg": "JPEG", "a.jpeg": "JPEG", "a.jpe": "JPEG", "a.jfif": "JPEG", "A.JPG": "JPEG", "a.webp": "WEBP",
    "a.avif": "AVIF", "a.heic": "HEIF", "a.heif": "HEIF", "a.hif": "HEIF", "a.bmp": "BMP", "a.gif": "GIF",
    "a.tif": "TIFF", "a.tiff": "TIFF",
    "a.ppm": "PPM", "a.tga": "TGA", "a.jp2": "JPEG2000", "a.ico": "ICO", "a.apng": "PNG", "no ending": "PNG",
    "a.unknown": "JPEG", "a.png.download": "PNG", "a.png": "JPEG", "ünï cödé.png": "PNG", "two  blanks .png": "PNG",
    "sub/deeper/a.png": "PNG", "a[1].png": "PNG",
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_used_whatever_its_name_says(folder, name):
    load_rgb(folder / "good.png")  # HEIC and AVIF are registered with it
    save(folder / name, PICTURES[name])
    listing, ledger = ledger_of(folder)
    assert [r.name for r in listing if r.name == name] == [name] and ledger.not_read == 0
    assert load_rgb(folder / name).mode == "RGB"


UNREAD = {
    ".hidden.png": HIDDEN, ".Trash-1000/files/deleted.png": HIDDEN, ".ipynb_checkpoints/a-checkpoint.png": HIDDEN,
    ".git/a.png": HIDDEN, "sub/.thumbnails/a.png": HIDDEN, "._good.png": HIDDEN, ".DS_Store": HIDDEN,
    "@eaDir/good.png/SYNOPHOTO_THUMB_M.png": SYSTEM, "__MACOSX/good.png": SYSTEM, "__MACOSX/._good.png": SYSTEM,
    "$RECYCLE.BIN/a.png": SYSTEM, "System Volume Information/a.png": SYSTEM, "lost+found/a.png": SYSTEM,
    "#recycle/a.png": SYSTEM, "Thumbs.db": SYSTEM, "desktop.ini": SYSTEM,
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_hidden_and_system_files_are_counted_and_not_read(folder, name):
    save(folder / name)
    listing, ledger = ledger_of(folder)
    assert [r.name for r in listing] == ["good.png"]
    assert list(ledger.reasons()) == [UNREAD[name]] and ledger.not_read == 1
    assert any("1 not read: " + UNREAD[name] in line for line in ledger.lines(folder))


OTHERS = {
    "notes.md": (b"# text", "its kind is not one that is read: .md"),
    "a.pdf": (b"%PDF-1.4 ...", "its kind is not one that is read: .pdf"),
    "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "its kind is not one that is read: .svg"),
    "a.mp4": (b"\0\0\0\x18ftypmp42", "its kind is not one that is read: .mp4"),
    "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its kind is not one that is read: .eps"),
    "a.safetensors": (b"x", "its kind is not one that is read: .safetensors"),
    "a.zip": (b"PK\x03\x04", "its kind is not one that is read: .zip"),
    "README": (b"text", "its kind is not one that is read: no ending"),
    "other.txt": (b"a caption of no picture", "a text without a picture of its name"),
    "other.caption": (b"a caption of no picture", "a text without a picture of its name"),
    "good.caption": (b"kohya's", "a caption that metadata, or a .txt file, stands in for"),
    "embeddings.parquet": (b"PAR1", "its kind is not one that is read: .parquet"),
    "other.json": (b"{}", "its kind is not one that is read: .json"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_with_their_reason(folder, name):
    content, reason = OTHERS[name]
    (folder / name).write_bytes(content)
    listing, ledger = ledger_of(folder)
    assert [r.name for r in listing] == ["good.png"] and list(ledger.reasons()) == [reason]
    assert ledger.unread[0].name == name


def test_links_are_named(folder, tmp_path):
    save(tmp_path / "elsewhere/a.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "file.png").symlink_to(tmp_path / "elsewhere/a.png")
    listing, ledger = ledger_of(folder)
    assert [r.name for r in listing] == ["file.png", "good.png"]
    reasons = {reason: sorted(one.name for one in some) for reason, some in ledger.reasons().items()}
    assert reasons == {
        "a folder behind a link: give that folder itself, or copy it": ["circle/", "linked/"],
        "a link to nothing": ["gone.png"],
    }


def test_what_is_no_file_is_named(folder):
    os.mkfifo(folder / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "s.png"))
    _, ledger = ledger_of(folder)
    assert list(ledger.reasons()) == ["no regular file"] and ledger.not_read == 2
    server.close()


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    (folder / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    ledger = list_images(folder).ledger
    assert [(one.name, one.reason) for one in ledger.unread] == [
        ("closed/", "the folder can't be listed: Permission denied")
    ]


BROKEN = {
    "empty.png": (b"", "not an image, or of an unknown format"),
    "text.png": (b"no picture", "not an image, or of an unknown format"),
    "page.jpg": (b"<html>404</html>", "not an image, or of an unknown format"),
    "a.heic": (b"\0\0\0\x18ftypheicx", "unreadable|not an image"),
    "a.avif": (b"\0\0\0\x18ftypavifx", "unreadable|not an image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_read_is_left_out_with_its_reason(folder, name):
    content, reason = BROKEN[name]
    (folder / name).write_bytes(content)
    listing, ledger = ledger_of(folder)
    assert ledger.pictures == 2 and ledger.not_read == 0
    with pytest.raises(ImageError, match=reason):
        load_rgb(next(r for r in listing if r.name == name).path)


def test_heic_without_its_package_says_what_to_install(folder, monkeypatch):
    from sdxl_ambient.images import load

    load_rgb(folder / "good.png")
    save(folder / "a.heic", "HEIF")
    without = tuple(kind for kind in load.formats() if kind != "HEIF")
    monkeypatch.setattr(load, "formats", lambda: without)
    with pytest.raises(ImageError, match=r"HEIC needs the package pillow-heif.*pip install pillow-heif"):
        load_rgb(folder / "a.heic")


def test_an_eps_file_is_never_given_to_another_program(folder, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not an image"):
        load_rgb(folder / "program.png")


# -- rows of metadata -------------------------------------------------------------------------------------------------


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


SPELLED = ["good.png", "./good.png", ".//good.png", "sub/../good.png", "ABSOLUTE"]


@pytest.mark.parametrize("name", SPELLED)
def test_a_row_lands_on_its_picture_however_it_is_spelled(folder, name):
    (folder / "good.txt").unlink()
    (folder / "sub").mkdir()
    write_rows(folder, {"file_name": str(folder / "good.png") if name == "ABSOLUTE" else name, "text": "of the row"})
    (record,) = list_images(folder)
    assert record.captions == ("of the row",)


def test_an_absolute_name_lands_whatever_way_the_folder_is_given(folder, monkeypatch, tmp_path):
    write_rows(folder, {"file_name": str((folder / "good.png").resolve()), "text": "of the row"})
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for given in ("images", "./images", "linked", str(folder), "images/../images"):
        assert list_images(given)[0].captions == ("of the row",), given


LOST = {
    "outside": ("../elsewhere/a.png", "is outside of the folder"),
    "outside, absolute": ("OUTSIDE", "is outside of the folder"),
    "not there": ("gone.png", "'gone.png' is not in the folder"),
    "a folder": ("sub", "'sub' is not in the folder"),
    "empty": ("", "'' is not in the folder"),
    "blank": (" ", "' ' is not in the folder"),
    "NUL": ("good.png\0", "is not in the folder"),
    "hidden": (".hidden.png", "lies in a hidden or system folder, or behind a link, and is not read"),
    "behind a link": ("linked/a.png", "lies in a hidden or system folder, or behind a link, and is not read"),
    "in the bin": (".Trash-1000/files/a.png", "lies in a hidden or system folder, or behind a link, and is not read"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_row_without_a_picture_is_an_error(folder, tmp_path, case):
    name, message = LOST[case]
    outside = save(tmp_path / "elsewhere/a.png")
    save(folder / ".hidden.png"), save(folder / ".Trash-1000/files/a.png"), (folder / "sub").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    write_rows(folder, {"file_name": str(outside) if name == "OUTSIDE" else name, "text": "a"})
    with pytest.raises(ImagesMissing, match=message) as error:
        list_images(folder)
    assert "metadata.jsonl, line 1" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_metadata_names_is_a_picture_or_left_out(folder):
    (folder / "a.pdf").write_bytes(b"%PDF-1.4")
    write_rows(folder, {"file_name": "a.pdf", "text": "a page"}, {"file_name": "good.png", "text": "b"})
    listing, ledger = ledger_of(folder)
    assert [r.name for r in listing] == ["a.pdf", "good.png"]
    with pytest.raises(ImageError, match="not an image"):
        load_rgb(folder / "a.pdf")


def test_several_rows_of_a_picture_are_several_captions(folder):
    write_rows(
        folder,
        {"file_name": "good.png", "text": "first", "level": 300},
        {"file_name": "./good.png", "text": ["second", "first"], "level": 300},
        {"file_name": "good.png", "level": 300},
    )
    (record,) = list_images(folder, Columns(t_n="level"))
    assert record.captions == ("first", "second") and record.t_n == 300
    write_rows(folder, {"file_name": "good.png", "level": 300}, {"file_name": "good.png", "level": 500})
    with pytest.raises(ImagesMissing, match="line 2: --t_n_column: 'level' is 500, and 300 in .*line 1, for the same file"):
        list_images(folder, Columns(t_n="level", captions_needed=False))


def test_metadata_may_be_a_parquet_file(folder):
    save(folder / "other.png")
    rows = {"file_name": ["good.png", "other.png", "other.png"], "text": ["a", "b", "c"], "level": [300, None, None]}
    pq.write_table(pa.table(rows), folder / "metadata.parquet")
    assert [r.captions for r in list_images(folder)] == [("a",), ("b", "c")]
    assert [r.t_n for r in list_images(folder, Columns(t_n="level"))] == [300, None]
    assert list_images(folder).ledger.texts == 1
    (folder / "metadata.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ImagesMissing, match="metadata.parquet can't be read"):
        list_images(folder)


CSV = {
    "blanks after commas": "file_name, text\ngood.png, a caption\n",
    "blanks about the names": " file_name , text \ngood.png,a caption\n",
    "CRLF": "file_name,text\r\ngood.png,a caption\r\n",
    "old Macs' line ends": "file_name,text\rgood.png,a caption\r",
    "quotes": 'file_name,text\n"good.png","a caption"\n',
    "blank lines": "file_name,text\n\ngood.png,a caption\n\n",
    "more columns": "id,file_name,author,text\n1,good.png,me,a caption\n",
}


@pytest.mark.parametrize("case", CSV)
def test_csv_files_of_all_kinds_are_read(folder, case):
    (folder / "metadata.csv").write_bytes(CSV[case].encode())
    assert list_images(folder)[0].captions == ("a caption",)


BAD_CSV = {
    "semicolons": ("file_name;text\ngood.png;a\n", "its first line names no 'file_name'"),
    "no header": ("good.png,a\n", "its first line names no 'file_name'"),
    "nothing": ("", "its first line names no 'file_name'"),
    "a name twice": ("file_name,text,text\ngood.png,a,b\n", "or a column twice"),
    "too many fields": ("file_name,text\ngood.png,a,b\n", "line 2: not a row"),
    "an open quote": ('file_name,text\ngood.png,"a\n', "line 2: "),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_csv_file_that_cannot_be_read_is_named(folder, case):
    text, message = BAD_CSV[case]
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(ImagesMissing, match=message) as error:
        list_images(folder)
    assert "metadata.csv" in str(error.value) and "\n" not in str(error.value)


# -- encodings --------------------------------------------------------------------------------------------------------

WORDS = "une tête, 红猫"
ENCODED = {
    "UTF-8": WORDS.encode(),
    "UTF-8 with its mark": codecs.BOM_UTF8 + WORDS.encode(),
    "UTF-16, little end first": codecs.BOM_UTF16_LE + WORDS.encode("utf-16-le"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + WORDS.encode("utf-32-le"),
    "CRLF": WORDS.encode() + b"\r\n",
    "blank lines about it": b"\r\n\r\n  " + WORDS.encode() + b" \n\n",
}


@pytest.mark.parametrize("case", ENCODED)
def test_captions_are_read_by_their_mark(folder, case):
    (folder / "good.txt").write_bytes(ENCODED[case])
    assert list_images(folder)[0].captions == (WORDS,)
    row = json.dumps({"file_name": "good.png", "text": WORDS}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(ENCODED[case].replace(WORDS.encode(), row.encode()))
    if case.startswith("UTF-16") or case == "UTF-32":
        codec = {"UTF-16, little": "utf-16", "UTF-16, big en": "utf-16-be", "UTF-32": "utf-32"}[case[:14]]
        mark = codecs.BOM_UTF16_BE if codec.endswith("be") else b""
        (folder / "metadata.jsonl").write_bytes(mark + row.encode(codec))
    (folder / "good.txt").unlink()
    assert list_images(folder)[0].captions == (WORDS,)


@pytest.mark.parametrize("name", ["good.txt", "good.caption", "metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize(("codec", "message"), [("latin-1", "is not UTF-8"), ("utf-16-le", "zero bytes|is not UTF-8")])
def test_another_encoding_is_refused_with_the_file_or_told(folder, name, codec, message):
    (folder / "good.txt").unlink()
    text = {"jsonl": '{"file_name": "good.png", "text": "tête"}', "csv": "file_name,text\ngood.png,tête\n"}
    (folder / name).write_bytes(text.get(name.rpartition(".")[2], "tête").encode(codec))
    with pytest.raises(ImagesMissing, match=message) as error:
        list_images(folder)
    assert name in str(error.value) and "--caption_encoding" in str(error.value) and "\n" not in str(error.value)
    assert list_images(folder, Columns(encoding=codec))[0].captions == ("tête",)


def test_a_mark_is_obeyed_before_the_option(folder):
    (folder / "good.txt").write_bytes(codecs.BOM_UTF8 + "tête".encode())
    assert list_images(folder, Columns(encoding="latin-1"))[0].captions == ("tête",)


def test_a_mark_does_not_make_a_prompt_of_a_comment(tmp_path):
    from eval.drawing import read_prompts
    from sdxl_ambient.config.training import TrainOptions

    file = tmp_path / "prompts.txt"
    for data in (codecs.BOM_UTF8 + b"# a comment\r\na red cat\r\n", "# a comment\na red cat\n".encode("utf-16")):
        file.write_bytes(data)
        assert TrainOptions(validation_prompts_file=str(file)).prompts == ["a red cat"]
        assert read_prompts(file)[-1] == "a red cat"


# -- colour -----------------------------------------------------------------------------------------------------------


def profile(name: str) -> bytes:
    """An ICC profile with the primaries of a colour space, as an RGB matrix profile of Little CMS' sRGB with them."""
    base = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green, blue = PRIMARIES[name]
    count = int.from_bytes(base[128:132], "big")
    for k in range(count):
        entry = 132 + 12 * k
        tag, offset = bytes(base[entry : entry + 4]), int.from_bytes(base[entry + 4 : entry + 8], "big")
        for wanted, xyz in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)):
            if tag == wanted:
                numbers = b"".join(round(v * 65536).to_bytes(4, "big", signed=True) for v in xyz)
                base[offset + 8 : offset + 20] = numbers
    return bytes(base)


# X, Y, Z of the primaries under D50, from the profiles' own definitions.
PRIMARIES = {
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
    "ProPhoto": ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)),
}


def linear(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def gamma(v):
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * np.maximum(v, 0) ** (1 / 2.4) - 0.055)


SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


@pytest.mark.parametrize("name", PRIMARIES)
def test_a_profile_is_converted_to_srgb(tmp_path, name):
    """Against the closed form in float64: linear light, the matrices of both spaces, sRGB's curve."""
    pixels = photographs.astronaut()[::8, ::8]
    image = Image.fromarray(pixels)
    path = save(tmp_path / "a.png", picture=image, icc_profile=profile(name))
    got = load_rgb(path)
    matrix = np.linalg.inv(SRGB) @ np.array(PRIMARIES[name]).T
    want = np.clip(gamma(linear(pixels / 255.0) @ matrix.T), 0, 1) * 255
    assert np.abs(np.asarray(got) - want).mean() < 1 and np.abs(np.asarray(got) - want).max() < 4
    assert np.abs(pixels - want).mean() > 4  # what is wrong without
    assert got.info["profile"]


def test_srgb_itself_and_no_profile_change_no_pixel(tmp_path):
    pixels = photographs.astronaut()[::4, ::4]
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for more in ({}, {"icc_profile": own}):
        image = load_rgb(save(tmp_path / "a.png", picture=Image.fromarray(pixels), **more))
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert "profile" not in image.info


def test_a_damaged_profile_is_told_and_the_picture_taken_as_it_is(tmp_path):
    image = load_rgb(save(tmp_path / "a.png", icc_profile=b"no profile"))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))
    assert image.info["profile"] == "unreadable"


def test_transparency_and_a_profile_go_together(tmp_path):
    clear = PICTURE.copy()
    clear.putalpha(Image.new("L", PICTURE.size, 0))
    image = load_rgb(save(tmp_path / "a.png", picture=clear, icc_profile=profile("ProPhoto")))
    assert np.asarray(image).min() == 255 and image.info["profile"]


def test_a_store_says_how_many_were_converted(build, tmp_path):
    images = tmp_path / "images"
    save(images / "a.png", icc_profile=profile("Display P3"))
    save(images / "b.png", picture=PICTURE.rotate(90))
    said = []
    manifest = build(images, tmp_path / "s", instance_prompt="a person", log=said.append)
    assert sum("1 images are converted to sRGB from the colour profile" in line for line in said) == 1
    assert sum(manifest["ledger"]["profiles"].values()) == 1


# -- data sets in a folder --------------------------------------------------------------------------------------------


def packed(folder, **splits):
    for name, pictures in splits.items():
        rows = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": rows, "text": ["a"] * len(rows)}), folder / f"{name}-00000-of-00001.parquet")
    return folder


def test_a_split_is_read_and_the_others_are_named(tmp_path):
    folder = packed(tmp_path / "p", train=[PICTURE] * 3, test=[PICTURE.rotate(90)] * 2)
    save(folder / "preview.png"), (folder / "README.md").write_text("# set")
    listing = open_records(folder, Columns(), log=lambda line: None)
    assert len(listing) == 3 and listing.ledger.files == 4 == listing.ledger.texts + listing.ledger.not_read
    reasons = {one.name: one.reason for one in listing.ledger.unread}
    assert reasons["test-00000-of-00001.parquet"] == "of the split test"
    assert "beside the .parquet files of a data set" in reasons["preview.png"] and "README.md" in reasons
    assert len(open_records(folder, Columns(), split="test", log=lambda line: None)) == 2
    with pytest.raises(ImagesMissing, match="--dataset_split: 'validation' is not one of: test, train"):
        open_records(folder, Columns(), split="validation")


def test_the_only_split_is_read(tmp_path):
    assert len(open_records(packed(tmp_path / "p", test=[PICTURE]), Columns(), log=lambda line: None)) == 1


def test_a_split_of_a_folder_of_images_is_refused(folder):
    with pytest.raises(ImagesMissing, match="--dataset_split: 'test' needs a data set, and .* is a folder of images"):
        open_records(folder, Columns(), split="test")


def test_tables_without_pictures_are_no_data_set(folder):
    pq.write_table(pa.table({"caption": ["a"]}), folder / "captions.parquet")
    listing = open_records(folder, Columns())
    assert [r.name for r in listing] == ["good.png"] and listing.ledger.not_read == 1


# -- the same everywhere ----------------------------------------------------------------------------------------------


def test_training_and_evaluation_have_one_ledger(folder, build, tmp_path):
    save(folder / "a.jfif", "JPEG", picture=PICTURE.rotate(90)), (folder / "a.txt").write_text("a")
    (folder / "text.png").write_bytes(b"no picture"), (folder / "text.txt").write_text("b")
    save(folder / ".Trash-1000/files/deleted.png"), (folder / "notes.md").write_text("")
    said = []
    manifest = build(folder, tmp_path / "s", log=said.append)
    images = read_folder(folder)
    for record in list(images.records):
        try:
            load_rgb(record.path)
        except ImageError as error:
            i = images.records.index(record)
            kept = [k for k in range(len(images)) if k != i]
            images = images.subset(kept, [{"file": record.name, "reason": str(error)}])
    evaluated, trained = images.record(), {k: v for k, v in manifest["ledger"].items() if k != "profiles"}
    assert evaluated == trained
    assert trained["files"] == 8 == trained["used"] + trained["left_out"] + trained["texts"] + trained["not_read"]
    assert (trained["used"], trained["left_out"], trained["not_read"]) == (2, 1, 2)
    assert f"{folder}: 8 files: 3 images, 3 texts about them, 2 not read" in said


def test_subfolders_that_are_called_like_splits_are_warned_of(tmp_path):
    """The datasets library reads one of them; here all are read, and it is said."""
    for name in ("train", "test"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), (i * 50, 0, 90)).save(tmp_path / "set" / name / f"{i}.png")
    lines = list_images(tmp_path / "set").ledger.lines("set")
    assert lines[-1] == (
        "warning: subfolders are called like splits (2 in train/, 2 in test/), and all are read; give 'set/train' to "
        "read one"
    )
    assert not [line for line in list_images(tmp_path / "set/train").ledger.lines("set") if "splits" in line]
    shutil.move(tmp_path / "set/test", tmp_path / "set/cats")
    assert not [line for line in list_images(tmp_path / "set").ledger.lines("set") if "splits" in line]
