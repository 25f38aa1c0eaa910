"""Names and captions that are not UTF-8 are refused when they are read, before anything is encoded."""

import json
import os

import pytest
from support.pictures import copy_emoji

from eval.drawing import read_prompts
from eval.images import read_folder
from sdxl_ambient.config.parser import load_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import ImagesMissing, OptionError, StageError
from sdxl_ambient.images.load import list_images


def printable(error) -> str:
    """The message, which every stream can print."""
    text = str(error.value)
    assert "\n" not in text
    return text.encode().decode()


@pytest.mark.parametrize("read", [list_images, read_folder])
def test_file_names_that_are_not_utf8_are_counted_and_refused(emoji, read):
    picture = next(emoji.glob("*.png"))
    (emoji / "fine é.png").write_bytes(picture.read_bytes())
    list_images(emoji)
    bad = os.fsencode(emoji)
    with open(bad + b"/a\xff.png", "wb") as file:
        file.write(picture.read_bytes())
    with pytest.raises(ImagesMissing) as error:
        read(emoji)
    assert r"1 file's name is not UTF-8, such as b'a\xff.png'" in printable(error)
    os.mkdir(bad + b"/\xe9")
    with open(bad + b"/\xe9/b.png", "wb") as file:
        file.write(picture.read_bytes())
    with pytest.raises(ImagesMissing, match="2 files' names are not UTF-8"):
        read(emoji)


@pytest.mark.parametrize("read", [list_images, read_folder])
def test_captions_that_are_not_utf8_are_refused(tmp_path, read):
    folder = copy_emoji(tmp_path / "images", 2)
    first, second = sorted(folder.glob("*.png"))[:2]
    rows = [{"file_name": first.name, "text": "fine"}, {"file_name": second.name, "text": ["fine", "bad \ud800"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ImagesMissing) as error:
        read(folder)
    assert "metadata.jsonl, line 2: 'text' holds half of a surrogate pair" in printable(error)
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "%s", "text": "\xed\xa0\x80"}' % first.name.encode())
    with pytest.raises(ImagesMissing, match="line 1: byte 41 is not UTF-8"):
        read(folder)
    (folder / "metadata.jsonl").write_bytes(b"[" * 100_000)
    with pytest.raises(ImagesMissing, match="line 1: not a JSON object"):
        read(folder)
    (folder / "metadata.jsonl").unlink()
    first.with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(ImagesMissing) as error:
        read(folder)
    assert ".txt, line 1: byte 3 is not UTF-8; save it as UTF-8, or say what it is with --caption_enc" in printable(error)


@pytest.mark.parametrize("line", ['{"text": "\\ud800"}', "[" * 100_000, '{"text": 1}', "[]", "9" * 5000])
def test_prompts_that_are_no_text_are_refused(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(StageError, match="prompt 2: not a JSON object with a 'text'"):
        read_prompts(file)


def test_options_that_are_not_utf8_are_refused():
    with pytest.raises(OptionError) as error:
        load_options(TrainOptions, ["--instance_prompt", os.fsdecode(b"caf\xe9")])
    assert printable(error) == r"--instance_prompt: 'caf\udce9' is not UTF-8"


@pytest.mark.parametrize("seed", ["-1", str(2**32), str(2**63), str(2**200), "1e400"])
def test_seeds_have_32_bits(seed):
    with pytest.raises(OptionError, match="^--seed: "):
        load_options(TrainOptions, ["--seed", seed])
