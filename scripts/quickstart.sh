#!/usr/bin/env bash
# Distils MiniFashion, real images of this repository, to one image a class and shows what that is worth:
#     bash scripts/quickstart.sh
# Every command it runs is printed as you would type it. What the same command made already is used again, what another
# one made is made again; delete quickstart/ to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

out=quickstart
set_folder=$out/logged_files/MiniFashion/1/ConvNetW32/quickstart
data="--dataset=MiniFashion --model=ConvNetW32 --zca"
test_it="$data --num_eval=5 --epoch_eval_train=300"
mkdir -p "$out"

step() {  # step MADE RESULT COMMAND…: runs the command, unless it made the result that is there; MADE is all it makes
    local made=$1 result=$2 made_by=$out/.made_by_$(basename "$2")
    shift 2
    if [ -e "$result" ] && [ "$(cat "$made_by" 2>/dev/null)" = "$*" ]; then
        printf '\n# %s is there already\n' "$result"
        return
    fi
    if [ -e "$made_by" ] || [ -e "$result" ]; then
        printf '\n# %s was made by another command, and is made again\n' "$made"
        rm -rf "$made" "$made_by"
    fi
    printf '\n$ %s\n' "$*"
    "$@"
    printf '%s\n' "$*" >"$made_by"
}

step $out/buffers $out/buffers/MiniFashion/ConvNetW32/replay_buffer_0.pt \
    python buffer/buffer_FTD.py $data --num_experts=4 --train_epochs=6 --batch_train=64 \
    --rho_max=0.01 --rho_min=0.01 --alpha=0.3 --lr_teacher=0.01 --buffer_path=$out/buffers
step $set_folder $set_folder/result.json \
    python distill/DATM.py --cfg configs/MiniFashion/ConvIN/IPC1.yaml \
    --buffer_path=$out/buffers --log_path=$out/logged_files --run_name=quickstart
step $out/random.json $out/random.json \
    python distill/baseline.py $test_it --ipc=1 --json=$out/random.json
step $out/random_expert_labels.json $out/random_expert_labels.json \
    python distill/baseline.py $test_it --ipc=1 --label_source=experts --buffer_path=$out/buffers \
    --json=$out/random_expert_labels.json
# The set after the last iteration, not the best one on the way: that was chosen on the test images.
step $out/distilled.json $out/distilled.json \
    python distill/evaluation.py $test_it --data_dir=$set_folder/Normal/images_300.pt \
    --label_dir=$set_folder/Normal/labels_300.pt --lr_dir=$set_folder/Normal/lr_300.pt --json=$out/distilled.json
step $out/whole.json $out/whole.json \
    python distill/baseline.py $data --num_eval=3 --epoch_eval_train=8 --batch_train=64 --ipc=None --json=$out/whole.json

echo
python scripts/summary.py $out/random.json $out/random_expert_labels.json $out/distilled.json $out/whole.json
echo
echo "the run:              $set_folder/result.json, metrics.jsonl, config.yaml"
echo "the distilled set:    $set_folder/Normal/images_300.pt, labels_300.pt, lr_300.pt"
echo "beside real images:   $set_folder/images.png"
echo "curves:               $set_folder/curves.png"
echo "experts:              $out/buffers/MiniFashion/ConvNetW32/replay_buffer_0.pt"
