"""Attacks on the weights of one model, on training images and held-out ones alike, as an auditor would run them.

python -m eval.attack --pretrained_model_name_or_path BASE [--lora DIR | --unet DIR] --train_data_dir DIR
--heldout_data_dir DIR
    --output_dir OUT [--attacks noise mask magnitude] [--attack_t 500 700 900] [--attack_modes one_step posterior]
    [--attack_prompts caption] [--mask_share 0.5]

noise      an image is noised to timestep t and denoised again: the error of ε̂ at t, and how near the image comes back
mask       a square in the middle of an image is cut out and inpainted: how near is that to what was there?
magnitude  how much an image's caption moves the predictions while an image is drawn for it

Images that were not trained on are the control: the figures are how well the two sets can be told apart (AUC, true
positives at 1 % false ones). The base model is attacked likewise, since one set may simply be harder. Writes attack.json,
every score and the figures; what is there is not done again. Under accelerate launch or torchrun the images are shared over
the processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.attacks.options import AttackOptions
from eval.schema import AttackFigures
from eval.shared_options import EmbedderOptions, ResultOptions, SetOptions
from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.shared import LoraOrUnetOptions, check_encoding
from sdxl_ambient.errors import OptionError, run_command


@dataclass
class AttackCommandOptions(
    ResultOptions, EmbedderOptions, SetOptions, LoraOrUnetOptions, AttackOptions
):  # the help shows the last one first
    """``python -m eval.attack``"""

    def validate(self) -> None:
        from eval.checkpoints import check_tuned  # here for start-up time

        for name in ("pretrained_model_name_or_path", "train_data_dir", "heldout_data_dir", "output_dir"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: required")
        check_encoding(self.caption_encoding)
        self.check_generation()
        check_tuned(self.lora, self.unet)
        self.check_embedder()


def main(argv: list[str] | None = None) -> int:
    options = parse_options(AttackCommandOptions, argv, prog="eval.attack", description=__doc__)
    return run_command("eval.attack", lambda: _locked(options))


def _locked(options: AttackCommandOptions) -> None:
    from eval.processes import locked_output

    with locked_output(options.output_dir):
        _attack(options)


def _attack(options: AttackCommandOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from eval import processes
    from eval.attacks.membership import attack_figures
    from eval.attacks.run import attack
    from eval.attacks.settings import AttackSettings
    from eval.checkpoints import tuned
    from eval.embedders.registry import load_embedder
    from eval.images import drop_duplicates, read_folder
    from sdxl_ambient.devices import resolve_device
    from sdxl_ambient.images.captions import Columns

    assert options.heldout_data_dir is not None, "validate() asks for it"
    main_process = processes.is_main()  # before anything is put on a GPU: it gives each process its own
    columns = Columns(options.caption_column, encoding=options.caption_encoding)
    sets = [read_folder(folder, columns) for folder in (options.train_data_dir, options.heldout_data_dir)]
    for line in (line for one in sets for line in one.ledger.lines(one.folder) if main_process):
        print(line)
    train = drop_duplicates(sets[0])
    heldout = drop_duplicates(sets[1], train)
    checkpoint = tuned(options.lora, options.unet, options.output_dir)
    embedder = load_embedder(options.embedder, options.embedder_weights, resolve_device(options.device))
    scores = attack(settings_of(AttackSettings, options), checkpoint, train, heldout, embedder, Path(options.output_dir))
    if main_process:
        _print(attack_figures(scores["train"], scores["heldout"]))
        print(Path(options.output_dir) / "attack.json")


def _print(figures: dict[str, AttackFigures]) -> None:
    for name, one in figures.items():
        low, high = one["auc_interval"]
        print(f"{name}: AUC {one['auc']:.3f} ({low:.3f} to {high:.3f}), TPR at 1 % FPR {one['tpr_at_1_fpr']:.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
