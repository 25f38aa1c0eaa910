"""Run the training script under FSDP on CPU processes.

accelerate shards on accelerators only, though torch's fully_shard works over gloo as well. So that the script's own path is
tested without a GPU, this takes that one restriction away before the script starts, and changes nothing else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

_usual = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **keywords):
    _usual(self, *args, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = _with_fsdp

if __name__ == "__main__":
    import train_sdxl_ambient

    raise SystemExit(train_sdxl_ambient.main())
