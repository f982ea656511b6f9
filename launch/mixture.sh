#!/usr/bin/env bash
# Does fine-tuning on ASMR alone forget ordinary speech? The paper's Table IV in small, at the size of the built-in model.
# Stage one trains language model and flow from nothing on ordinary voices only. Stage two goes on from stage one, once
# with ASMR only and once with both, one to one, for the same number of steps. Tokenizer, speaker encoder, vocoder and
# pool are those of MODEL. Then each of the three models speaks the four tasks, and all are judged alike.
#
#   bash launch/mixture.sh CORPUS OUT [FEATURES]     CORPUS: records with the split test, such as
#                                                    WORK/corpus/records/synthetic/1.0.0 of launch/mini.sh
#   MODEL=WORK/mini bash launch/mixture.sh ...       the other parts of another model than the built-in one
#   START=FOLDER bash launch/mixture.sh ...          stage one goes on from this model in place of random weights
#   EXTRA_SET, EXTRA_TABLE="--per-row 48"            options for every training, for the tables
#
# FEATURES of CORPUS are made with MODEL where none are given. Every step goes on where it was stopped; a finished one is
# skipped. The joined table is printed and ends in OUT/table.md. Needs: pip install -e ".[zh,eval]"; for Mandarin the
# judge of launch/mini.sh, EXTRA_TABLE="--languages zh --judge WORK/judge". A CPU without bfloat16 products is faster with
# EXTRA_SET="--set=model.dtype=float32". Cost: 2.7 CPU hours of an AMD EPYC without such products in all, the tables of 48
# utterances a row included (docs/training.md).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
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
# stage two at a constant rate, as in the paper; its 1e-5 is for a network 60 times as large and many more steps
rate=(--set=optim.lr=5e-4 --set=optim.schedule=constant --set=optim.warmup_steps=50)
declare -A steps=([stage_one_flow]=2500 [asmr_only_flow]=800 [mixture_flow]=800 [stage_one_lm]=1000 [asmr_only_lm]=300 [mixture_lm]=300)
declare -A heard=([stage_one]=normal [asmr_only]=asmr [mixture]=normal,asmr)
declare -A weights=([stage_one]=1 [asmr_only]=1 [mixture]=1,1)
runs="$out/runs"
mkdir -p "$runs" "$out/models"

train() { # name of the model, network, more options: a run of configs/mini.py, exported into the model
  local name="$1" network="$2"
  shift 2
  "$python" -m deepasmr_jax.train "--config=configs/mini.py:$network" "--workdir=$out/runs/${name}_$network" \
    "--export=$out/models/$name" "--set=data.data_dirs=$features" "--set=data.styles=${heard[$name]}" \
    "--set=data.style_weights=${weights[$name]}" "--set=steps=${steps[${name}_$network]}" "$@" \
    "${extra[@]}" --stopped-exit=75 # a run that was stopped early is not done
}

if [ $# -lt 3 ]; then
  step features whole "$features" "$python" data/add_features.py --data "$corpus" --model "$model" --out "$features"
fi
first=(${START:+"--set=init_from=$START"})
later=("--set=init_from=$out/models/stage_one" "${rate[@]}")
for name in stage_one asmr_only mixture; do
  step "copy_$name" cp -rT "$model" "$out/models/$name"
  for network in flow lm; do
    if [ "$name" = stage_one ]; then
      step "${name}_$network" train "$name" "$network" "${first[@]}"
    else
      step "${name}_$network" train "$name" "$network" "${later[@]}"
    fi
  done
done
for name in stage_one asmr_only mixture; do
  mkdir -p "$out/tables/$name"
  enrolled="$out/tables/stage_one/factors.json" # the judge hears the same recordings, so it is enrolled once
  [ "$name" = stage_one ] || [ ! -f "$enrolled" ] || cp "$enrolled" "$out/tables/$name"
  step "table_$name" "$python" launch/table.py --data "$corpus" --model "$out/models/$name" --parts main \
    --rows "text to" --out "$out/tables/$name" "${extra_table[@]}"
done
{
  head -n 2 "$out/tables/stage_one/table.md"
  for name in stage_one asmr_only mixture; do
    sed -n "s/^| text to /| ${name/_/ }, /p" "$out/tables/$name/table.md"
  done
  echo
  tail -n 1 "$out/tables/stage_one/table.md"
} >"$out/table.md.part"
mv "$out/table.md.part" "$out/table.md"
cat "$out/table.md"
