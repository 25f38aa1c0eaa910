"""Checkpoint + prompts → images, each from its own seed, so that neither batch size nor an interruption changes any
image.

python -m eval.generate --pretrained_model_name_or_path BASE [--lora DIR | --unet DIR] --prompts_file FILE
--output_dir OUT
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

from eval.checkpoints import check_tuned, model_errors, tuned
from eval.drawing import GenerationOptions, captions_of, describe, generate_images, open_checkpoint, plan, read_prompts
from eval.processes import collect, is_main
from eval.samplers import MODES as SAMPLERS
from eval.samplers import own_samplers
from sdxl_ambient.config.parser import option, parse_options
from sdxl_ambient.errors import ImagesMissing, OptionError, StageError

# -- command line ------------------------------------------------------------------


@dataclass
class GenerateOptions(GenerationOptions):
    lora: str | None = option(None, "LoRA: directory or .safetensors file", metavar="PATH")
    unet: str | None = option(None, "fully fine-tuned UNet: directory or .safetensors file", metavar="PATH")
    sampler: str = option("full", "how to sample", choices=SAMPLERS)
    train_data_dir: str | None = option(None, "prompts are this data set's captions", metavar="DIR")
    caption_column: str = option("text", "key of the caption in metadata.jsonl")
    output_dir: str | None = option(None, "folder to write to", metavar="DIR")

    def validate(self) -> None:
        for name in ("pretrained_model_name_or_path", "output_dir"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: required")
        if (self.prompts_file is None) == (self.train_data_dir is None):
            raise OptionError("--prompts_file: give this or --train_data_dir, whose captions are then the prompts")
        self.check_generation()
        check_tuned(self)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(GenerateOptions, argv, prog="eval.generate", description=__doc__)
    is_main()  # gives each process its GPU, before anything is loaded
    try:
        checkpoint = tuned(options)
        (sampler,) = own_samplers(checkpoint, options, [options.sampler])
        prompts = (
            read_prompts(options.prompts_file)
            if options.prompts_file
            else captions_of(options.train_data_dir, options.caption_column)
        )
        draws = plan(prompts, options.seed, options.num_images, options.images_per_prompt, options.num_seeds)
        draw = functools.partial(open_checkpoint(options, checkpoint), sampler=sampler)
        settings = describe(options, checkpoint, sampler, draws)
        done = sum(collect([generate_images(options.output_dir, settings, draws, draw, options.batch_size)]))
    except (OptionError, StageError, ImagesMissing, OSError, *model_errors()) as error:
        print(f"eval.generate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if is_main():
        print(f"{len(draws)} images in {options.output_dir}, {done} of them drawn now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
