"""Images → features, in batches, computed once per content: image, embedder, preprocessing and weights are the
cache's key.

python -m eval.embed --image_dir DIR [DIR …] --embedder dinov2 --output_dir CACHE
    fills a cache (OUT/embeddings of an evaluation, for instance), alone or in several processes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.shared_options import BatchOptions
from sdxl_ambient.config.parser import option, parse_options
from sdxl_ambient.config.shared import DeviceOptions
from sdxl_ambient.errors import OptionError, run_command


@dataclass
class EmbedOptions(DeviceOptions, BatchOptions):
    """Images and cache"""

    image_dir: list[str] = option([], "folders of images", metavar="DIR")
    output_dir: str = option(None, "the cache, one folder per embedder", metavar="DIR")

    def validate(self) -> None:
        if not self.image_dir or self.output_dir is None:
            raise OptionError(f"--{'output_dir' if self.image_dir else 'image_dir'}: required")
        for folder in self.image_dir:
            if not Path(folder).is_dir():
                raise OptionError(f"--image_dir: {folder!r} is not a folder")
        self.validate_device()
        self.check_embedder()


def main(argv: list[str] | None = None) -> int:
    options = parse_options(EmbedOptions, argv, prog="eval.embed", description=__doc__)
    return run_command("eval.embed", lambda: _locked(options))


def _locked(options: EmbedOptions) -> None:
    from eval.processes import locked_output

    with locked_output(options.output_dir):
        _embed(options)


def _embed(options: EmbedOptions) -> None:
    # Here for start-up time: options are parsed before torch and transformers are imported.
    from eval.embedders.registry import load_embedder
    from eval.embedding import embed
    from eval.images import read_folder
    from eval.processes import is_main
    from sdxl_ambient.devices import resolve_device

    is_main()  # gives each process its GPU, before anything is loaded
    embedder = load_embedder(options.embedder, options.embedder_weights, str(resolve_device(options.device)))
    for folder in options.image_dir:
        found = embed(read_folder(folder), embedder, options.output_dir, options.embedding_batch_size)
        if is_main():
            print(f"{folder}: {len(found)} images in {Path(options.output_dir) / embedder.key}")
            for row in found.images.excluded:
                print(f"  left out: {row['file']}: {row['reason']}")


if __name__ == "__main__":
    raise SystemExit(main())
