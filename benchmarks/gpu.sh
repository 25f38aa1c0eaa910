#!/usr/bin/env bash
# Everything that only a GPU can show, in one go of at most 9 minutes on one 80 GB card.
#
#   benchmarks/gpu.sh WHEELS RESULTS [SECONDS]
#
# The machine needs CUDA, PyTorch, transformers, accelerate, peft and pytest, and no network: diffusers, datasets and what else
# is missing are installed from the folder WHEELS. JSON goes to the folder RESULTS. What doesn't fit into SECONDS (540) is left
# out, the most important first; each step reports whether it ended.
set -u
wheels=$1 results=$2 limit=${3:-540}
began=$(date +%s)
site=$(mktemp -d)
cd "$(dirname "$0")/.."
mkdir -p "$results"
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
export PYTHONPATH=$site:$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

attempt() {  # attempt NAME COMMAND…: within the time that is left
  local name=$1 left=$((limit - $(date +%s) + began)); shift
  if [ "$left" -lt 20 ]; then echo "== $name: left out, no time"; return; fi
  echo "== $name ($left s left)"
  timeout "$left" "$@" 2>&1 | grep -v -i -e warning -e '^\[transformers\]' | tail -12
  echo "== $name: exit ${PIPESTATUS[0]} at $(($(date +%s) - began)) s"
}
step() {  # step NAME FLAGS…
  local name=$1; shift
  attempt "$name" python3 -m benchmarks.step_time --model sdxl --precision bf16 --json "$results/$name.json" "$@"
}

attempt tests python3 -m pytest -q -p no:cacheprovider tests/integration/test_cuda.py
step step_time-gpu-lora-b1 --finetune lora --batch_size 1 --steps 5
step step_time-gpu-lora-b4-checkpointing --finetune lora --batch_size 4 --steps 3 --gradient_checkpointing
step step_time-gpu-full-b1-checkpointing --finetune full --batch_size 1 --steps 3 --gradient_checkpointing \
  --kinds plain ambient consistency official restore
attempt throughput python3 -m benchmarks.throughput --json "$results/throughput-gpu.json"
step step_time-gpu-lora-b4 --finetune lora --batch_size 4 --steps 3 --kinds plain ambient consistency
step step_time-gpu-lora-b8-checkpointing --finetune lora --batch_size 8 --steps 3 --gradient_checkpointing \
  --kinds plain ambient consistency
if python3 -c 'import xformers' 2>/dev/null; then
  step step_time-gpu-lora-b1-xformers --finetune lora --batch_size 1 --steps 5 --kinds plain ambient --attention xformers
fi
step step_time-gpu-lora-b1-compile --finetune lora --batch_size 1 --steps 5 --kinds plain ambient --compile
