"""A LoRA trained with differential privacy (DP-SGD), to compare with: what one would take instead of noisy latents.

    python -m benchmarks.dp_lora --pretrained_model_name_or_path miniature/pipeline --latents_dir CLEAN --output_dir OUT \
        --learning_rate 1e-3 --max_train_steps 300 --batch_size 64 --epsilon 10

CLEAN is a store of clean latents (``python -m sdxl_ambient.latents --t_n none``). A few weights on a public model are
trained with plain denoising score matching, as DP-LDM does (arXiv 2406.01355), by the algorithm of Abadi et al. (arXiv
1607.00133): a step draws each image with probability q = batch_size/n (Poisson subsampling), clips each image's own
gradient to norm C, adds N(0, (noise_multiplier · C)²) to their sum, divides by batch_size, and hands that to Adam. An
image's gradient is the mean over ``noise_multiplicities`` draws of (t, ξ), taken before it is clipped (arXiv 2210.09929):
better gradients, the same privacy. OUT gets an adapter like any other of this project.

What is promised: (ε, δ)-differential privacy of the adapter's weights, by opacus's accountant.

- The unit is one image with its captions, added or removed. The number of images, the options, the base model and its text
  encoders are taken to be public. Pictures that show the same thing are as many units.
- δ is 1/(10 n) unless given. At δ = 1/n, giving away one image in every run would count as private. A tenth of that is the
  most that can be called small, and it favours this method: any smaller δ takes more noise.
- It is for a study, and no guarantee in production: what is drawn follows from ``seed``, so that a run can be repeated, and
  whoever knows the seed can subtract the noise. No artefact has it. opacus's secure_mode, against attacks on floating-point
  noise, is off.
- Of the private data nothing else is told. There is no training loss on the screen, and no hash of the data in the adapter.
  dp_lora.json beside it has the cost, in which the sizes of the batches show, and is not for sharing.

Needs the package opacus. Runs on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.private_training import REQUIRED, DpLoraOptions, train_dp_lora
from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.errors import OptionError, run_command
from sdxl_ambient.formats.record import LORA_FILE


def main(argv: list[str] | None = None) -> int:
    options = parse_options(DpLoraOptions, argv, prog="benchmarks.dp_lora", description=__doc__)
    settings = {name: value for name, value in vars(options).items() if name not in REQUIRED}
    assert options.output_dir is not None, "validated"
    output = Path(options.output_dir)

    def train() -> None:
        if (output / LORA_FILE).exists():
            raise OptionError(f"--output_dir: {str(output)!r} holds an adapter already; allowed is another folder")
        print(json.dumps(train_dp_lora(*(getattr(options, name) for name in REQUIRED), **settings), indent=2))

    return run_command("benchmarks.dp_lora", train)


if __name__ == "__main__":
    raise SystemExit(main())
