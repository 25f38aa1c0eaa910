"""How much of a fine-tuning set does a model reproduce? Runs the stages in order; a second run redoes nothing.

python -m eval.memorization --pretrained_model_name_or_path BASE --lora [NAME=]PATH … --train_data_dir DIR
    --heldout_data_dir DIR --output_dir OUT [--samplers full hybrid] [--sampler_t_n 500]
python -m eval.memorization --pretrained_model_name_or_path BASE --checkpoints RUN …      every checkpoint-* of a run
python -m eval.memorization --generated_dir [NAME=]DIR … --train_data_dir DIR --heldout_data_dir DIR --output_dir OUT

OUT gets generated/MODEL/SAMPLER/, embeddings/, attacks/, controls.json, report.json and index.html. Under accelerate launch
or torchrun, drawing, embedding and attacks are shared over the processes.
Exit codes: 0 within the budget (--max_excess) for certain, or none given; 1 over it for certain; 2 error; 3 neither is
shown, or too few control images to calibrate (the report then has descriptive figures only).
"""

from __future__ import annotations

from pathlib import Path

from eval.options import BASE, MemorizationOptions
from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.errors import run_command
from sdxl_ambient.provenance import write_sealed


def main(argv: list[str] | None = None) -> int:
    options = parse_options(MemorizationOptions, argv, prog="eval.memorization", description=__doc__)
    return run_command("eval.memorization", lambda: _locked(options))


def _locked(options: MemorizationOptions) -> int:
    from eval.processes import locked_output

    with locked_output(options.output_dir):
        return _evaluate(options)


def _evaluate(options: MemorizationOptions) -> int:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from eval.evaluation import evaluate
    from eval.processes import is_main
    from eval.reporting.cautions import cautions
    from eval.reporting.page import write_html
    from eval.reporting.pictures import choose
    from eval.reporting.verdict import decide
    from eval.settings import evaluation_settings

    is_main()  # gives each process its GPU, before anything is loaded
    report = evaluate(evaluation_settings(options))
    if report is None:
        return 0
    write_sealed(Path(options.output_dir) / "report.json", report)
    choice = choose(options.pictures, options.max_excess)
    page = write_html(report, options.output_dir, choice)
    codes = []
    for name, model in report["models"].items():
        code, budget = decide(model, options.max_excess)
        print(f"{name}: {model['verdict']['text']}" + (f" It is {budget}." if budget and name != BASE else ""))
        if name != BASE or len(report["models"]) == 1:  # the base model is a control
            codes.append(code)
    for sentence in cautions(report):
        print(sentence)
    print(choice.sentence)
    print(page)
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
