#!/usr/bin/env bash
# Rebuilds the built-in model from nothing: corpus, tokenizer, tokens, speaker encoder, LM, flow, vocoder, judge, pool.
# Every step goes on where it was stopped; a finished step is skipped. All speech in it is synthetic.
#
#   bash launch/mini.sh [WORK]          WORK holds corpus and runs (default workdir); the model ends in WORK/mini
#   EXTRA_SET="--set=max_seconds=600" bash launch/mini.sh    options for every training stage
#   EXTRA_CORPUS="--limit 2000", EXTRA_TABLE="--per-row 8"   options for making the corpus and for the tables
#
# Needs: pip install -e ".[corpus,zh,eval]" and the programs flite, festival and its voice (see data/README.md).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
work="${1:-workdir}"
model="$work/mini"
corpus="$work/corpus/records/synthetic/1.0.0"
features="$work/corpus/features/1.0.0"
read -r -a extra <<<"${EXTRA_SET:-}"
read -r -a extra_corpus <<<"${EXTRA_CORPUS:-}"
read -r -a extra_table <<<"${EXTRA_TABLE:-}"
runs="$work/runs"
mkdir -p "$runs"
python="${PYTHON:-python}"

train() { # stage, data, more options: a training stage of configs/mini.py, exported into the model
  local stage="$1" data="$2"
  shift 2
  step "$stage" logged "$work/runs/$stage.log" "$python" -m deepasmr_jax.train "--config=configs/mini.py:$stage" \
    "--workdir=$work/runs/$stage" "--set=data.data_dirs=$data" "${extra[@]}" "$@" \
    --stopped-exit=75 # a run that was stopped early (max_seconds, SIGTERM) is not done
}

logged() { # log, command...: also writes into the log what the command prints
  local log="$1" code=0
  shift
  "$@" 2>&1 | tee -a "$log" || code=$?
  [ "$code" != 75 ] || echo "stopped early; run the same command again to go on" >&2
  return "$code"
}

step corpus_raw "$python" data/synthetic.py make --out "$work/corpus/raw" --workers "${WORKERS:-2}" "${extra_corpus[@]}"
step corpus "$python" data/synthetic.py build --raw "$work/corpus/raw" --out "$work/corpus/records"
train speech_tokenizer "$corpus" "--export=$model"
train speaker "$corpus" "--export=$model"
step features whole "$features" "$python" data/add_features.py --data "$corpus" --model "$model" --out "$features"
train lm_normal "$features"
train lm "$features" "--set=init_from=$work/runs/lm_normal/export" "--export=$model"
train flow_normal "$features"
train flow "$features" "--set=init_from=$work/runs/flow_normal/export" "--export=$model"
train vocoder "$corpus" "--export=$model"
train recognizer "$corpus" "--export=$work/judge"
step settings "$python" data/mini_assets.py settings --out "$model"
step pool_sources "$python" data/mini_assets.py pool --data "$corpus" --out "$work/pool_sources"
step pool "$python" -m deepasmr_jax.cli pool build "$work/pool_sources/manifest.jsonl" \
  --asmr-sample "$work/pool_sources/asmr_en.wav" --asmr-sample "$work/pool_sources/asmr_zh.wav" --model "$model" --out "$model/pool.safetensors"
step demo "$python" data/mini_assets.py demo --data "$corpus" --out "$model/demo"
step table "$python" launch/table.py --data "$corpus" --model "$model" --judge "$work/judge" --parts main --out "$work/table" "${extra_table[@]}"
step table_en "$python" launch/table.py --data "$corpus" --model "$model" --parts pool passes transcript --languages en --out "$work/table_en" "${extra_table[@]}"
step table_hts "$python" launch/table.py --data "$corpus" --model "$model" --split hts --parts main --out "$work/table_hts" "${extra_table[@]}"
echo "model: $model"
