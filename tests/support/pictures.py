"""The shipped pictures, copied for a test."""

import json
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def copy_emoji(folder: Path, count: int, split: str = "finetune") -> Path:
    """Copy the first emoji of a split, with their captions, into a new folder."""
    source = REPOSITORY / "miniature" / "data" / split
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()][:count]
    for row in rows:
        shutil.copy(source / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
