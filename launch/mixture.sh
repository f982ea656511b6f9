#!/usr/bin/env bash
# Does fine-tuning on ASMR alone forget ordinary speech? The paper's Table IV in small, on the built-in model.
# Stage one goes on from MODEL with ordinary voices only. Stage two goes on from stage one, once with ASMR only and once
# with both, one to one, for the same number of steps. Then each model speaks the four tasks, and all are judged alike.
#
#   bash launch/mixture.sh CORPUS OUT [FEATURES]     CORPUS: records with the split test, such as
#                                                    WORK/corpus/records/synthetic/1.0.0 of launch/mini.sh
#   MODEL=WORK/mini bash launch/mixture.sh ...       another start than the shipped weights
#   EXTRA_SET, EXTRA_TABLE="--per-row 48"            options for every training, for the tables
#
# FEATURES of CORPUS are made with MODEL where none are given. Every step goes on where it was stopped; a finished one is
# skipped. The joined table is printed and ends in OUT/table.md. Needs: pip install -e ".[zh,eval]"
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  echo "give the folder of the records and a folder for the runs: bash launch/mixture.sh CORPUS OUT" >&2
  exit 2
fi
corpus="$1"
out="$2"
features="${3:-$out/features/1.0.0}"
model="${MODEL:-deepasmr_jax/mini}"
read -r -a extra <<<"${EXTRA_SET:-}"
read -r -a extra_table <<<"${EXTRA_TABLE:-}"
python="${PYTHON:-python}"
# a constant rate, as in the paper's stage two; the paper's 1e-5 is for a network 60 times as large and many more steps
rate=(--set=optim.lr=5e-4 --set=optim.schedule=constant --set=optim.warmup_steps=50)
declare -A steps=([stage_one_flow]=300 [asmr_only_flow]=300 [mixture_flow]=300 [stage_one_lm]=200 [asmr_only_lm]=100 [mixture_lm]=100)
declare -A heard=([stage_one]=normal [asmr_only]=asmr [mixture]=normal,asmr)
declare -A weights=([stage_one]=1 [asmr_only]=1 [mixture]=1,1)
mkdir -p "$out/runs" "$out/models"

step() { # name, command...: runs the command once
  local name="$1"
  shift
  if [ -f "$out/runs/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name: $*"
  "$@"
  touch "$out/runs/$name.done"
}

train() { # name of the model, network, start: a run of configs/mini.py, exported into the model
  "$python" -m deepasmr_jax.train "--config=configs/mini.py:$2" "--workdir=$out/runs/$1_$2" "--export=$out/models/$1" \
    "--set=init_from=$3" "--set=data.data_dirs=$features" "--set=data.styles=${heard[$1]}" \
    "--set=data.style_weights=${weights[$1]}" "--set=steps=${steps[$1_$2]}" "${rate[@]}" \
    "${extra[@]}" --stopped-exit=75 # a run that was stopped early is not done
}

if [ $# -lt 3 ]; then
  step features "$python" data/add_features.py --data "$corpus" --model "$model" --out "$features"
fi
start="$model"
for name in stage_one asmr_only mixture; do
  step "copy_$name" cp -rT "$model" "$out/models/$name"
  for network in flow lm; do
    step "${name}_$network" train "$name" "$network" "$start"
  done
  start="$out/models/stage_one"
done
for name in start stage_one asmr_only mixture; do
  folder="$out/models/$name"
  mkdir -p "$out/tables/$name"
  if [ "$name" = start ]; then
    folder="$model"
  else # the judge hears the same recordings, so it is enrolled once
    cp "$out/tables/start/factors.json" "$out/tables/$name"
  fi
  step "table_$name" "$python" launch/table.py --data "$corpus" --model "$folder" --languages en --parts main \
    --rows "text to" --out "$out/tables/$name" "${extra_table[@]}"
done
{
  head -n 2 "$out/tables/start/table.md"
  for name in start stage_one asmr_only mixture; do
    sed -n "s/^| text to /| ${name/_/ }, /p" "$out/tables/$name/table.md"
  done
  echo
  tail -n 1 "$out/tables/start/table.md"
} >"$out/table.md.part"
mv "$out/table.md.part" "$out/table.md"
cat "$out/table.md"
