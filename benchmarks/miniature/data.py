"""The miniature's images: the 1,911 base Noto emoji, in families that never straddle the three splits.

The source is the npm archive of emoji-datasource-google 16.0.0 (images Apache-2.0). Near-duplicates would make any
memorisation figure meaningless: a held-out image that has a twin in the fine-tuning set measures nothing. Images
are therefore joined into families by name, by bytes and by pixels, and a hash of the family's key picks the split.
"""

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SPLITS = ("pretrain", "finetune", "heldout")
IMAGE_FOLDER = "package/img/{vendor}/64/"

# A pair is a near-duplicate if its pictures, shrunk to 16x16 on white, differ by little or are strongly correlated.
# Chosen by looking at pairs: at 0.92, 88 mostly round yellow faces chain into one family (at 0.95 only 49 of them);
# below 0.90, things that merely share a colour and an outline are joined too.
ROOM = 8  # crops are taken from pictures enlarged by this many pixels
MAX_RMS = 0.06
MIN_CORRELATION = 0.92
# A family above this size would tilt a small split towards one motif (flags of one layout, people in one pose).
MAX_SMALL_SPLIT_FAMILY = 8
FINETUNE_SHARE = 0.08
HELDOUT_SHARE = 0.105

# Words that tell variants of one drawing apart: who is in it, which way they look, which number it shows.
VARIANT_WORDS = frozenset(
    """
    man men woman women person people adult adults boy boys girl girls child children baby male female mans womans
    mens womens older old young elderly mr mrs mx
    left right leftwards rightwards upwards downwards up down north south east west facing pointing
    anticlockwise clockwise
    one two three four five six seven eight nine ten eleven twelve oclock thirty first second third last
    black white red orange yellow green blue purple brown grey pink light dark heavy large medium small
    with and of the sign symbol
    """.split()
)
# Names that begin alike for one drawing with its parts exchanged.
GROUP_PREFIXES = ("family:", "clock face", "keycap", "hash key", "couple with heart", "kiss:", "emoji modifier")


@dataclass(frozen=True)
class Emoji:
    """One base emoji: `png` holds the archive's bytes, `text` its lower-cased name."""

    file_name: str
    text: str
    png: bytes

    def on_white(self):
        """float32 array (64, 64, 3) in [0, 1], the picture composited on white."""
        return composite_on_white(Image.open(io.BytesIO(self.png)))


def composite_on_white(image):
    """float32 array (height, width, 3) in [0, 1] of a PIL image, its transparent parts white."""
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def read_archive(archive, vendor="google"):
    """The base emoji of an emoji-datasource-VENDOR .tgz, sorted by file name."""
    pngs, records, folder = {}, [], IMAGE_FOLDER.format(vendor=vendor)
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (file := tar.extractfile(member)):
                continue  # a folder
            if member.name == "package/emoji.json":
                records = json.load(file)
            elif member.name.startswith(folder) and member.name.endswith(".png"):
                pngs[member.name.removeprefix(folder)] = file.read()
    emoji = [Emoji(r["image"], r["name"].lower(), pngs[r["image"]]) for r in records if r[f"has_img_{vendor}"]]
    return sorted(emoji, key=lambda e: e.file_name)


def name_key(emoji):
    """What is left of a name without the words that only tell variants apart."""
    for prefix in GROUP_PREFIXES:
        if emoji.text.startswith(prefix):
            return prefix
    words = re.findall(r"[^\W_]+", emoji.text.replace("'", "").replace("’", ""))
    return " ".join(w for w in words if w not in VARIANT_WORDS and not w.isdigit()) or "person"


def thumbnails(emoji):
    """float64 array (n, 16 * 16 * 3): each picture on white, averaged over 4x4 blocks."""
    pictures = np.stack([e.on_white() for e in emoji]).astype(np.float64)
    return pictures.reshape(len(emoji), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(emoji), -1)


def pixel_similarity(thumbs):
    """Two (n, n) arrays: root-mean-square difference, and correlation of the centred thumbnails."""
    squares = (thumbs**2).sum(1)
    mean_square = (squares[:, None] + squares[None] - 2 * thumbs @ thumbs.T) / thumbs.shape[1]
    centred = thumbs - thumbs.mean(1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-6)
    return np.sqrt(mean_square.clip(0)), centred @ centred.T


def families(emoji):
    """List of family keys, one per emoji: the smallest file name among all that are joined, directly or in a chain."""
    parent = list(range(len(emoji)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i, j):
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    first_with = {}
    for i, e in enumerate(emoji):
        for fact in (("name", name_key(e)), ("bytes", e.png)):
            join(first_with.setdefault(fact, i), i)
    difference, correlation = pixel_similarity(thumbnails(emoji))
    for i, j in np.argwhere(np.triu((difference <= MAX_RMS) | (correlation >= MIN_CORRELATION), 1)):
        join(int(i), int(j))
    return [emoji[root(i)].file_name for i in range(len(emoji))]


def split_of(family, size):
    """The split of a family: a fixed hash of its key, except that large families always go to pre-training."""
    u = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big") / 2**64
    if size > MAX_SMALL_SPLIT_FAMILY or u >= FINETUNE_SHARE + HELDOUT_SHARE:
        return "pretrain"
    return "finetune" if u < FINETUNE_SHARE else "heldout"


def split(emoji):
    """Dict of split name -> list of Emoji."""
    keys = families(emoji)
    sizes = Counter(keys)
    parts = {name: [] for name in SPLITS}
    for e, key in zip(emoji, keys, strict=False):
        parts[split_of(key, sizes[key])].append(e)
    return parts


def write_imagefolders(parts, folder):
    """Write folder/{pretrain,finetune,heldout}/ with the archive's unmodified PNGs and a metadata.jsonl each."""
    for name, members in parts.items():
        target = Path(folder, name)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for e in members:
            (target / e.file_name).write_bytes(e.png)
        lines = [json.dumps({"file_name": e.file_name, "text": e.text}, ensure_ascii=False) for e in members]
        (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_emoji(folder):
    """The emoji of one written split, in the order of its metadata.jsonl."""
    lines = Path(folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [Emoji(r["file_name"], r["text"], Path(folder, r["file_name"]).read_bytes()) for r in records]


def read_imagefolder(folder):
    """Captions (list of n str) and pictures on white, uint8 tensor (n, 3, 64, 64), of one written split."""
    emoji = read_emoji(folder)
    pixels = torch.from_numpy(np.stack([e.on_white() for e in emoji])).mul(255).round().to(torch.uint8)
    return [e.text for e in emoji], pixels.permute(0, 3, 1, 2).contiguous()


def random_crops(pixels, count, seed):
    """Whole pictures and random crops of them enlarged by an eighth.

    pixels: uint8 (n, 3, 64, 64). Returns views, uint8 (1 + count, n, 3, 64, 64), and the crops' upper left corners in
    pixels, int64 (1 + count, n, 2), x before y: 0 for the whole picture, which comes first, else from 1 to ROOM.
    """
    n, _, height, width = pixels.shape
    size = (height + ROOM, width + ROOM)
    large = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    large = large.round().clamp(0, 255).to(torch.uint8)
    corners = torch.randint(1, ROOM + 1, (count, n, 2), generator=torch.Generator().manual_seed(seed))
    views = [pixels]
    for row in corners.tolist():
        cut = [p[:, y : y + height, x : x + width] for p, (x, y) in zip(large, row, strict=True)]
        views.append(torch.stack(cut))
    return torch.stack(views), torch.cat([torch.zeros(1, n, 2, dtype=torch.long), corners])


def mirrored(corners, flip):
    """The corners (n, 2) of crops in the enlarged picture's mirror image where flip (n,) is 1; whole pictures' stay."""
    x, y = corners.unbind(-1)
    return torch.stack([torch.where((flip == 1) & (y > 0), ROOM - x, x), y], dim=-1)
