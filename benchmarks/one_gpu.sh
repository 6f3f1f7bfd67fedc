#!/bin/bash
# What dev/LOG.md names as next for one GPU, in two lanes that share it, in at most LIMIT seconds; rows as they come.
#
#     python benchmarks/coder/fetch.py && python benchmarks/coder/make_tasks.py     # before, where there is a network
#     OUT=/tmp/one LIMIT=1600 bash benchmarks/one_gpu.sh                             # $OUT/done at its end
#
# blocks   Which blocks go, by what training brings back: those before the last one beside those that KL chooses, two,
#          four and six of 24, 1M to 10M tokens (benchmarks/coder/experiments.py, the shortest first).
# shapes   A hybrid and a mixture through the whole job, to the verification of their exports; then merges of 32B and 70B.
#
# A lane that fails or is cut leaves its rows. Seconds of stages are upper bounds, since the lanes share the card; SHAPES=
# or BLOCKS= (empty) leaves a lane out.
set -u
OUT=${OUT:?folder of the results}
LIMIT=${LIMIT:-1600}
SCRATCH=${SCRATCH:-$OUT.scratch}
PYTHON=${PYTHON:-python3}
BLOCKS=${BLOCKS-yes}
SHAPES=${SHAPES-yes}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
began=$SECONDS
mkdir -p "$OUT" "$SCRATCH"; rm -f "$OUT/done"

left() { local rest=$((LIMIT - 15 - (SECONDS - began))); echo $((rest > 1 ? rest : 1)); }
say() { echo "$((SECONDS - began)) s: $*" | tee -a "$OUT/one.txt"; }
part() {  # NAME SECONDS COMMAND...: no longer than that, nor than the time that is left
    local name=$1 seconds=$2; shift 2
    timeout -k 10 $(($(left) < seconds ? $(left) : seconds)) "$PYTHON" "$@" > "$OUT/$name.txt" 2>&1
    say "$name ended with $?"
}

: > "$OUT/one.txt"
[ -z "$BLOCKS" ] || part blocks "$LIMIT" benchmarks/coder/experiments.py recipes/qwen2.5-coder-0.5b-drop2.yaml \
    --out "$SCRATCH/blocks" --results "$OUT/blocks.jsonl" --beside 2 --limit-seconds $(($(left) - 10)) \
    --set probe.sublayers=false probe.items=0 train.epochs=1 measure.samples=1319 measure.epoch_limit=4 \
    --only late2+1M+wider+scoredall@0 late2+3M+wider+scoredall@0 late4+3M+wider+scoredall@0 late2+1M+wider+jsd@0 \
    late2+10M+wider+scoredall@0 late6+3M+wider+scoredall@0 late4+10M+wider+scoredall@0 &
(
    [ -n "$SHAPES" ] || exit 0
    part hybrid 450 benchmarks/whole_job.py --shape qwen3.5-9b --seconds 430 --folder "$SCRATCH" --out "$OUT/hybrid"
    part mixture 330 benchmarks/whole_job.py --shape 30b-a3b --blocks 12 --seconds 310 --folder "$SCRATCH" \
        --out "$OUT/mixture"
    part bigger 700 benchmarks/bigger.py --out "$OUT/bigger.jsonl" --seconds 330 --stages merge \
        --rows 32B:4bit 70B:4bit
) &
wait
touch "$OUT/done"
say "all over"
