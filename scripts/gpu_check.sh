#!/usr/bin/env bash
# What the program does on a GPU, and how fast, in less than ten minutes:
#     bash scripts/gpu_check.sh [FOLDER]
# FOLDER (gpu_check) gets what each part printed and measured before the next part begins, and gpu_check.json, which has
# all of it. Each part has a time limit of its own: the speed takes three minutes, the numbers and the tests one or two,
# each of the others seconds. Without a GPU, or on the stand-in for one (tests/fakecuda), the parts that need a real one
# are skipped, and said to be. Exit code 1: a part failed.
set -uo pipefail
source "$(dirname "$0")/help.sh"
if [[ ${1:-} == -* ]]; then
    printf 'gpu_check.sh: error: unknown option %s; give a folder, or nothing (see --help)\n' "$1" >&2
    exit 2
fi
out=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
out=${out:-gpu_check}
if [ -e "$out" ] && [ ! -f "$out/parts.tsv" ] && [ -n "$(ls -A "$out")" ]; then
    printf 'gpu_check.sh: error: %s holds something other than an earlier check; give a new or empty folder\n' "$out" >&2
    exit 2
fi
python=${PYTHON:-python3}
"$python" -c "import distill.loop" 2>/dev/null || { source scripts/venv.sh; python=python; }
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.json
: >"$out/parts.tsv"
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [[ ${LD_PRELOAD:-} == *fakecuda* ]]; then gpu=0; fi

trap 'exit 130' INT  # after the part in the foreground, which Ctrl-C stops too
END=570  # seconds within which everything must end
parts=$(grep -cE '^(part|on_gpu) ' scripts/gpu_check.sh) number=0

part() {  # part NAME CODES SECONDS COMMAND…: runs it; CODES are the exit codes of a success
    local name=$1 codes=$2 limit=$(($3 < END - SECONDS ? $3 : END - SECONDS)) began=$SECONDS code said=failed
    number=$((number + 1))
    shift 3
    if [ "$limit" -lt 5 ]; then
        printf '%s\tno time left\t\t0\t%s\n' "$name" "$*" >>"$out/parts.tsv"
        return
    fi
    printf '\n--- part %s of %s, %s, %s s at most: %s\n' "$number" "$parts" "$name" "$limit" "$*"
    {
        timeout --foreground -s INT -k 15 "$limit" "$@" 2>&1 | tee -i "$out/$name.log" | tail -n 25
        code=${PIPESTATUS[0]}
    } 2>/dev/null  # where bash reports a part that is killed on purpose
    for right in $codes; do
        if [ "$code" = "$right" ]; then said=ok; fi
    done
    if [ "$said" = failed ] && [ $((SECONDS - began)) -ge "$limit" ]; then said="no time left"; fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$said" "$code" $((SECONDS - began)) "$*" >>"$out/parts.tsv"
    collect
}

on_gpu() {  # on_gpu NAME CODES SECONDS COMMAND…: a part that needs a real GPU
    if [ "$gpu" = 1 ]; then
        part "$@"
    else
        number=$((number + 1))
        printf '\n--- part %s of %s, %s: skipped, there is no real GPU\n' "$number" "$parts" "$1"
        printf '%s\tskipped\t\t0\t%s\n' "$1" "${*:4}" >>"$out/parts.tsv"
    fi
}

collect() {  # everything so far, as one file
    "$python" - "$out" <<'EOF'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
parts = [dict(zip(("part", "said", "code", "seconds", "command"), line.split("\t")))
         for line in (out / "parts.tsv").read_text().splitlines()]
for part in parts:
    log = out / f"{part['part']}.log"
    part["last_lines"] = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else []
measured = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))
            if path.name != "gpu_check.json"}
(out / "gpu_check.json").write_text(json.dumps({"parts": parts, "measured": measured}, indent=1) + "\n")
EOF
}

# A real GPU must still be at work when it is killed, and the stand-in must finish within its time limit.
model=ConvNetW8 epochs=3 iterations=80 few=5 networks=2 killed="0 137"
if [ "$gpu" = 1 ]; then model=ConvNetW32 epochs=150 iterations=300 few=20 networks=40 killed=137; fi
data="--dataset=MiniFashion --model=$model"
run="$out/logged_files/MiniFashion/1/$model/run"
experts=("$python" buffer/buffer_FTD.py $data --num_experts=1 "--train_epochs=$epochs" --batch_train=256 --rho_max=0.01
         --rho_min=0.01 "--buffer_path=$out/buffers")
distil=("$python" distill/DATM.py --cfg=configs/MiniFashion/ConvIN/IPC1.yaml $data --zca=False --max_start_epoch=1
        --num_eval=1 --epoch_eval_train=50 --threshold=10 "--buffer_path=$out/buffers" "--log_path=$out/logged_files")
evaluate=("$python" distill/evaluation.py "--data_dir=$run" "--num_eval=$networks" --epoch_eval_train=300
          "--json=$out/evaluation.json")
rm -rf "$out/buffers" "$out/two_ranks" "$out/logged_files"

on_gpu compiler 0 60 "$python" -c \
    "import torch; from utils.derivatives.choose_engine import *; check_backend('compile', torch.device('cuda'))"
compiled=$(grep -qP '^compiler\tok\t' "$out/parts.tsv" && echo --backend=compile)
on_gpu numbers 0 120 "$python" scripts/measure/precision.py --device=cuda --draws=1 "--json=$out/numbers.json"
on_gpu speed 0 200 "$python" scripts/measure/benchmark.py --device=cuda \
    --shape cifar10_ipc1 cifar10_ipc10 cifar10_ipc50 cifar100_ipc50 tiny_ipc50 --rounds=3 --max_minutes=2.5 \
    "--json=$out/speed.json"
# A program that was killed is resumed by the same command.
part experts_killed "$killed" 45 timeout -s KILL 12 "${experts[@]}"
part experts 0 100 "${experts[@]}"
part distillation_killed "$killed" 45 timeout -s KILL 20 "${distil[@]}" --run_name=run "--Iteration=$iterations"
part distillation 0 120 "${distil[@]}" --run_name=run "--Iteration=$iterations"
part tesla 0 90 "${distil[@]}" --run_name=tesla --matching=tesla "--Iteration=$few" $compiled
part unroll 0 90 "${distil[@]}" --run_name=unroll --matching=unroll "--Iteration=$few"
part evaluation_killed "$killed" 45 timeout -s KILL 10 "${evaluate[@]}"
part evaluation 0 60 "${evaluate[@]}"
part two_ranks 0 60 "$python" -m torch.distributed.run --standalone --nproc_per_node=2 "${experts[@]:1}" \
    --num_experts=2 "--buffer_path=$out/two_ranks"  # the ranks share the GPU
# Last, as they take longest; in several processes if pytest-xdist is installed.
several=$("$python" -c 'import xdist; print("-n 6")' 2>/dev/null)
on_gpu tests 0 300 "$python" -m pytest -q -m cuda $several -p no:cacheprovider --tb=short

collect
echo
awk -F'\t' '{ printf "%-20s %-14s %4s s\n", $1, $2, $4 }' "$out/parts.tsv"
echo "all of it: $out/gpu_check.json"
! grep -qP '\t(failed|no time left)\t' "$out/parts.tsv"
