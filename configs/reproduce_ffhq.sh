#!/usr/bin/env bash
# The paper's runs on FFHQ (arXiv 2404.10177) with SDXL, one after the other, and all that is measured of them.
#
#   configs/reproduce_ffhq.sh FFHQ HELDOUT OUT [GPUS] [IMAGES]
#
# FFHQ: a folder of the 1024² images; HELDOUT: a few thousand of them that are kept out of the first; OUT: for stores, adapters,
# images and the report. GPUS (8) must divide the paper's batch of 16. IMAGES (50000) are drawn of each model for its FID,
# which any tool takes from OUT/fid/RUN/images and the folder FFHQ. A run that was interrupted goes on from its last
# checkpoint, a store or an image that is there is not made again. Expected figures: docs/REPRODUCTION.md.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
ffhq=$1 heldout=$2 out=$3 gpus=${4:-8} images=${5:-50000}
cd "$(dirname "$0")/.."
if ((16 % gpus)); then echo "GPUS: $gpus does not divide 16; allowed are 1, 2, 4, 8, 16" >&2; exit 2; fi
base=stabilityai/stable-diffusion-xl-base-1.0
runs=(clean t100 t500 t800 t100_consistency t500_consistency t800_consistency)

# The runs of one t_n share a store: a second one would be a second observation of every picture.
for level in 100 500 800; do
  accelerate launch --config_file configs/accelerate/multi_gpu.yaml --num_processes "$gpus" -m sdxl_ambient.latents \
    --pretrained_model_name_or_path $base --train_data_dir "$ffhq" --instance_prompt 'a portrait photograph' \
    --resolution 1024 --t_n $level --noise_key_file "$HOME/.ffhq_noise_key" --output_dir "$out/latents_t$level"
done
for run in "${runs[@]}"; do
  store=()
  if [[ $run =~ ^t([0-9]+) ]]; then store=(--latents_dir "$out/latents_t${BASH_REMATCH[1]}"); fi
  if [ ${#store[@]} -eq 0 ]; then store=(--train_data_dir "$ffhq"); fi
  accelerate launch --config_file configs/accelerate/multi_gpu.yaml --num_processes "$gpus" --mixed_precision fp16 \
    train_sdxl_ambient.py --config_file configs/ffhq_$run.yaml "${store[@]}" \
    --train_batch_size $((16 / gpus)) --output_dir "$out/$run" --resume_from_checkpoint latest
done

# Images for the FID: levels that nothing trained are left out by stopping at t_n, as the paper does without consistency.
echo 'a portrait photograph' > "$out/prompt.txt"
for run in "${runs[@]}"; do
  sampler=full
  case $run in t100 | t500 | t800) sampler=early_stop ;; esac
  accelerate launch --config_file configs/accelerate/multi_gpu.yaml --num_processes "$gpus" -m eval.generate \
    --pretrained_model_name_or_path $base --lora "$out/$run" --sampler $sampler --prompts_file "$out/prompt.txt" \
    --num_images "$images" --num_inference_steps 25 --dtype bfloat16 --batch_size 16 --output_dir "$out/fid/$run"
done

# The noise attack at t = 900 and the nearest neighbours, with held-out images beside them; then errors at the paper's levels.
loras=()
for run in "${runs[@]}"; do loras+=("$run=$out/$run"); done
accelerate launch --config_file configs/accelerate/multi_gpu.yaml --num_processes "$gpus" -m eval.memorization \
  --config_file configs/ffhq_eval.yaml --lora "${loras[@]}" --train_data_dir "$ffhq" --heldout_data_dir "$heldout" \
  --output_dir "$out/report"
for run in "${runs[@]}"; do
  python -m eval.attack --pretrained_model_name_or_path $base --lora "$out/$run" --train_data_dir "$ffhq" \
    --heldout_data_dir "$heldout" --attacks noise --attack_t 900 800 500 100 --attack_modes one_step --attack_images 32 \
    --dtype bfloat16 --output_dir "$out/errors/$run"
done
echo "Report: $out/report/index.html; errors: $out/errors/*/attack.json; images for the FID: $out/fid/*/images"
