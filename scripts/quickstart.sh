#!/usr/bin/env bash
# Distils MiniFashion, real images of this repository, to one image per class and shows what that is worth:
#     bash scripts/quickstart.sh
# Every command it runs is printed as you would type it. What the same command made already is used again; what another
# command made, or what was made of older files, is made again. Delete quickstart/ to start over.
set -euo pipefail
source "$(dirname "$0")/help.sh"
if [ $# -gt 0 ]; then
    printf 'quickstart.sh: error: unexpected argument %s; it takes none (see --help)\n' "$1" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
source scripts/venv.sh

out=quickstart
experts=$out/buffers/MiniFashion/ConvNetW32/replay_buffer_0.pt
config=configs/MiniFashion/ConvIN/IPC1.yaml
run=$out/logged_files/MiniFashion/1/ConvNetW32/quickstart
distilled=$run/Normal/distilled.safetensors  # the best set, which the run's pictures and page show too
data="--dataset=MiniFashion --model=ConvNetW32 --zca"
mkdir -p "$out"
export DATM_PART_OF=quickstart.sh  # this script, not the command that was stopped, says how to resume

# step MADE RESULT OF COMMAND…: runs it, unless the same command made RESULT and none of the files OF is newer. MADE is
# all that it makes, deleted before it is made again.
step() {
    local made=$1 result=$2 of=$3 made_by=$out/.made_by_$(basename "$2") file again=no
    shift 3
    for file in $of; do
        if [ "$file" -nt "$result" ] && [ "$file" -nt "$made_by" ]; then again=yes; fi
    done
    if [ $again = no ] && [ "$(cat "$made_by" 2>/dev/null)" = "$*" ]; then
        if [ -e "$result" ]; then
            printf '\n# %s is there already\n' "$result"
            return
        fi  # else the command resumes what it was stopped in
    else
        if [ -e "$made_by" ] || [ -e "$result" ]; then
            printf '\n# %s was made by another command or of older files, and is made again\n' "$made"
            rm -rf "$made" "$made_by"
        fi
        printf '%s\n' "$*" >"$made_by"
    fi
    printf '\n$ %s\n' "$*"
    "$@" || ended $?
}

ended() {  # ended STATUS: of a command that failed or, above 128, was stopped by a signal
    if [ "$1" -gt 128 ]; then
        printf 'The quickstart resumes with: bash scripts/quickstart.sh\n' >&2
    fi
    exit "$1"
}

# A tenth of the training images is held out of both experts and distillation, to choose the best set on; the test
# images are only for the table.
step $out/buffers $experts "" \
    python buffer/buffer_FTD.py $data --val_fraction=0.1 --num_experts=4 --train_epochs=6 --batch_train=64 \
    --rho_max=0.01 --rho_min=0.01 --alpha=0.3 --lr_teacher=0.01 --buffer_path=$out/buffers
step $run $run/result.json "$config $experts" \
    python distill/DATM.py --cfg $config --val_fraction=0.1 \
    --buffer_path=$out/buffers --log_path=$out/logged_files --run_name=quickstart
step $out/random.json $out/random.json "" \
    python distill/baseline.py $data --num_eval=5 --epoch_eval_train=300 --ipc=1 --json=$out/random.json
step $out/distilled.json $out/distilled.json $distilled \
    python distill/evaluation.py $data --num_eval=5 --epoch_eval_train=300 --data_dir=$distilled \
    --json=$out/distilled.json
step $out/whole.json $out/whole.json "" \
    python distill/baseline.py $data --num_eval=3 --epoch_eval_train=8 --batch_train=64 --ipc=None --json=$out/whole.json

echo
python scripts/summary.py $out/random.json $out/distilled.json $out/whole.json
echo
echo "the distilled set:     $distilled"
echo "beside real images:    $run/images.png"
echo "the run on one page:   $run/report.html"
