"""How much of a fine-tuning set does a model reproduce? Runs the stages in order; a second run redoes nothing.

python -m eval.memorization --pretrained_model_name_or_path BASE --lora [NAME=]PATH … --train_data_dir DIR
    --heldout_data_dir DIR --output_dir OUT [--samplers full hybrid] [--sampler_t_n 500]
python -m eval.memorization --pretrained_model_name_or_path BASE --checkpoints RUN …      every checkpoint-* of a run
python -m eval.memorization --generated_dir [NAME=]DIR … --train_data_dir DIR --heldout_data_dir DIR --output_dir OUT

OUT gets generated/MODEL/SAMPLER/, embeddings/, attacks/, controls.json, report.json and index.html. Under accelerate launch
or torchrun, drawing, embedding and attacks are shared over the processes.
Exit codes: 0 within the budget (or none given), 1 over the memorisation budget (--max_excess), 2 error, 3 too few control
images to calibrate (the report then has descriptive figures only).
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
    from eval.reporting.page import write_html
    from eval.reporting.verdict import over_budget
    from eval.settings import evaluation_settings

    is_main()  # gives each process its GPU, before anything is loaded
    report = evaluate(evaluation_settings(options))
    if report is None:
        return 0
    write_sealed(Path(options.output_dir) / "report.json", report)
    page = write_html(report, options.output_dir)
    for name, model in report["models"].items():
        print(f"{name}: {model['verdict']['text']}")
    print(page)
    if report["threshold"]["value"] is None:
        return 3
    over = [n for n, m in report["models"].items() if options.max_excess is not None and over_budget(m, options.max_excess)]
    over = [n for n in over if n != BASE]  # the base model is a control
    if over:
        print(f"Over the budget of {options.max_excess:.1%} copies: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
