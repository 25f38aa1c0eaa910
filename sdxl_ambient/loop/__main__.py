r"""The ambient loop: from a store of noisy latents, a store of samples at a lower noise level that a model draws given them.

    python -m sdxl_ambient.loop --pretrained_model_name_or_path BASE --lora RUN --latents_dir STORE --t_n 300 \
        --output_dir RESTORED

x_n *is* x_t at t = t_n, so the model's reverse chain from it down to t = m gives one sample of p(x_m | x_n). Training goes
on from those at t_n = m, the next model draws the next store, and so on: expectation-maximisation, a store for each round
(Bai et al., arXiv 2405.13712; Hosseintabar et al., arXiv 2510.12691). ``--low_noise restore`` does the like within a run, in
a buffer.

The new store has the layout of any (:mod:`sdxl_ambient.latents`), and plan.json and manifest.json say what it holds:
``restored`` is its lineage, a round for each time that a model drew, the oldest first. Every image has the level that it was
observed at, ``observed_t_n``. Restored samples are no observations: what protects an image is its one observation behind
them, as long as the models that drew them have seen nothing else of it. See docs/LOOP.md.
"""

from __future__ import annotations

from sdxl_ambient.config import parse_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.errors import run_command
from sdxl_ambient.loop.options import LoopOptions


def main(argv: list[str] | None = None) -> int:
    options = parse_options(LoopOptions, argv, prog="sdxl_ambient.loop", description=__doc__)
    return run_command("sdxl_ambient.loop", lambda: _restore(options))


def _restore(options: LoopOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.devices import processes
    from sdxl_ambient.loop.run import restore_store
    from sdxl_ambient.loop.settings import LoopSettings

    restore_store(settings_of(LoopSettings, options), processes())


if __name__ == "__main__":
    raise SystemExit(main())
