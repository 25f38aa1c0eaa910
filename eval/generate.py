"""Checkpoint + prompts → images, each from its own seed, so that neither batch size nor an interruption changes any
image.

python -m eval.generate --pretrained_model_name_or_path BASE [--lora DIR | --unet DIR] --prompts_file FILE
--output_dir OUT
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from eval.choices import SAMPLERS
from eval.shared_options import GenerationOptions, ResultOptions, SetOptions
from sdxl_ambient.config.parser import option, parse_options, redeclare
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.shared import LoraOrUnetOptions, check_encoding, check_outside
from sdxl_ambient.errors import OptionError, run_command


@dataclass
class GenerateOptions(ResultOptions, LoraOrUnetOptions, GenerationOptions):
    """Sampler and captions"""

    sampler: str = option("full", "how to sample", choices=SAMPLERS)
    train_data_dir: str | None = redeclare(SetOptions, "train_data_dir")
    caption_column: str = redeclare(SetOptions, "caption_column")
    caption_encoding: str | None = redeclare(SetOptions, "caption_encoding")

    def validate(self) -> None:
        from eval.checkpoints import check_tuned  # here for start-up time

        for name in ("pretrained_model_name_or_path", "output_dir"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: required")
        if (self.prompts_file is None) == (self.train_data_dir is None):
            raise OptionError("--prompts_file: give this or --train_data_dir, whose captions are then the prompts")
        check_outside("output_dir", self.output_dir, train_data_dir=self.train_data_dir)
        check_encoding(self.caption_encoding)
        self.check_generation()
        check_tuned(self.lora, self.unet)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(GenerateOptions, argv, prog="eval.generate", description=__doc__)
    return run_command("eval.generate", lambda: _locked(options))


def _locked(options: GenerateOptions) -> None:
    from eval.processes import locked_output

    with locked_output(options.output_dir):
        _generate(options)


def _generate(options: GenerateOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from eval.checkpoints import tuned
    from eval.drawing import (
        GenerationSettings,
        base_folder,
        captions_of,
        describe,
        generate_images,
        open_checkpoint,
        plan,
        read_prompts,
    )
    from eval.processes import collect, is_main
    from eval.samplers import SamplerSettings, samplers_of
    from sdxl_ambient.images.captions import Columns
    from sdxl_ambient.pipeline import first_timestep

    is_main()  # gives each process its GPU, before anything is loaded
    checkpoint = tuned(options.lora, options.unet, options.output_dir)
    own = settings_of(SamplerSettings, options, samplers=[options.sampler], worst_case="none", worst_case_images=None)
    generation = settings_of(GenerationSettings, options)
    first = first_timestep(base_folder(generation), options.num_inference_steps)
    (sampler,) = samplers_of(checkpoint, own, first)
    if options.train_data_dir is not None:
        columns = Columns(options.caption_column, encoding=options.caption_encoding)
        prompts = captions_of(options.train_data_dir, columns)
    else:
        assert options.prompts_file is not None, "validate() asks for one of the two"
        prompts = read_prompts(options.prompts_file)
    draws = plan(prompts, options.seed, options.num_images, options.images_per_prompt, options.num_seeds)
    draw = functools.partial(open_checkpoint(generation, checkpoint), sampler=sampler)
    settings = describe(generation, checkpoint, sampler, draws)
    done = sum(collect([generate_images(options.output_dir, settings, draws, draw, options.batch_size)]))
    if is_main():
        print(f"{len(draws)} images in {options.output_dir}, {done} of them drawn now")


if __name__ == "__main__":
    raise SystemExit(main())
