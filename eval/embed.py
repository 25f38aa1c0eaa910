"""Images → features, in batches, computed once per content: image, embedder, preprocessing and weights are the
cache's key.

python -m eval.embed --image_dir DIR [DIR …] --embedder dinov2 --output_dir CACHE
    fills a cache (OUT/embeddings of an evaluation, for instance), alone or in several processes
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from eval.embedders.registry import EMBEDDERS, check_embedder, load_embedder
from eval.embedding import embed
from eval.images import read_folder
from eval.processes import is_main
from sdxl_ambient.config.parser import option, parse_options
from sdxl_ambient.devices import check_device, resolve_device
from sdxl_ambient.errors import ImagesMissing, OptionError, StageError

# -- command line ------------------------------------------------------------------


@dataclass
class EmbedOptions:
    image_dir: list[str] = option([], "folders of images", metavar="DIR")
    embedder: str = option("pixel", "what similarity is measured in", choices=EMBEDDERS)
    embedder_weights: str | None = option(None, "local path or Hub id of the embedder's weights", metavar="PATH_OR_ID")
    embedding_batch_size: int = option(32, "images embedded at once", minimum=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    output_dir: str | None = option(None, "the cache, one folder per embedder", metavar="DIR")

    def validate(self) -> None:
        if not self.image_dir or self.output_dir is None:
            raise OptionError(f"--{'output_dir' if self.image_dir else 'image_dir'}: required")
        for folder in self.image_dir:
            if not Path(folder).is_dir():
                raise OptionError(f"--image_dir: {folder!r} is not a folder")
        check_device(self.device)
        try:
            check_embedder(self.embedder, self.embedder_weights)
        except StageError as error:
            raise OptionError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    options = parse_options(EmbedOptions, argv, prog="eval.embed", description=__doc__)
    is_main()  # gives each process its GPU, before anything is loaded
    try:
        embedder = load_embedder(options.embedder, options.embedder_weights, resolve_device(options.device))
        for folder in options.image_dir:
            found = embed(read_folder(folder), embedder, options.output_dir, options.embedding_batch_size)
            if is_main():
                print(f"{folder}: {len(found)} images in {Path(options.output_dir) / embedder.key}")
                for row in found.images.excluded:
                    print(f"  left out: {row['file']}: {row['reason']}")
    except (OptionError, StageError, ImagesMissing, OSError) as error:
        print(f"eval.embed: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
