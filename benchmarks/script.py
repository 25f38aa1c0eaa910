"""The training script in this process, which spares the imports."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState


def train_here(arguments: list[str]) -> int:
    """Run the script; its exit code. Nothing of accelerate's state is left behind."""
    import train_sdxl_ambient

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        return train_sdxl_ambient.main(arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
