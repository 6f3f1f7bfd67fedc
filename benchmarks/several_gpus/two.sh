#!/bin/bash
# Everything of benchmarks/several_gpus that is worth its seconds on a machine with two GPUs, in at most 420 of them.
#
#     OUT=/tmp/b2 bash benchmarks/several_gpus/two.sh        # tables and rows as they come; $OUT/done at its end
#     TINY=1 LIMIT=900 OUT=/tmp/b2 bash benchmarks/several_gpus/two.sh    # two CPU processes: shows that it runs
#
# seconds   part
#   0-150   whole, deaths, law: float32 laws of the whole job and of training steps, one process killed in each stage.
#           All are small and run beside one another; the 7B model is made beside them, and from second 105 on the
#           launches of the next two parts load their libraries.
# 150-305   turns: tokens/s and memory at 7B and 0.5B, one GPU, DDP, ZeRO-3, ZeRO-2, weights shared out; nothing beside.
#           It begins as soon as the first parts have ended.
# 305-415   seven: the whole job at 7B, a row as each stage ends. It begins as soon as turns has ended, and is cut where
#           the time ends.
#
# A part that fails or is cut leaves its rows, ends all that it started, and the next one begins.
set -u
OUT=${OUT:?folder of the results}
SCRATCH=${SCRATCH:-$OUT.scratch}
LIMIT=${LIMIT:-420}
TINY=${TINY:-}
PYTHON=${PYTHON:-python3}
HERE=$(dirname "$0")
# An NVLink multicast that fails can take the GPUs of a shared host out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
began=$SECONDS
rm -rf "$SCRATCH"; mkdir -p "$OUT" "$SCRATCH"; rm -f "$OUT/done"

left() { echo $((LIMIT - 5 - (SECONDS - began))); }  # seconds until all must be over
share() { local most=$(($1 * LIMIT / 420)) now; now=$(left); echo $((most < now ? most : now > 1 ? now : 1)); }
till() { local rest=$(($1 * LIMIT / 420 - (SECONDS - began))); echo $((rest > 1 ? rest : 1)); }  # that second
say() { echo "$((SECONDS - began)) s: $*" | tee -a "$OUT/two.txt"; }
part() {  # SECONDS NAME WORDS...: the parts, no longer than that
    local seconds=$1 name=$2; shift 2
    timeout -k 10 "$seconds" "$PYTHON" "$HERE/several_gpus.py" "$@" --gpus 2 --out "$OUT" --scratch "$SCRATCH/$name" \
        ${TINY:+--tiny} > "$OUT/$name.txt" 2>&1
    say "$name ended with $?"
}

: > "$OUT/two.txt"
nvidia-smi topo -m > "$OUT/topology.txt" 2>&1
say "begins; the limit is $LIMIT s"
(
    shape=7b; [ -z "$TINY" ] || shape=tiny
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-1} timeout -k 5 "$(share 140)" "$PYTHON" "$HERE/seven.py" \
        "$SCRATCH/model" --shape "$shape" > "$OUT/model.txt" 2>&1
    say "the model for seven: ended with $?, $(du -sm "$SCRATCH/model" 2> /dev/null | cut -f 1) MB"
) &
model=$!
part "$(share 150)" small whole deaths law --beside &
small=$!
sleep "$(share 105)" &
nap=$!
wait -n $small $nap
part "$(till 305)" turns turns --go "$SCRATCH/turns-go" &
turns=$!
part "$(left)" seven seven --model "$SCRATCH/model" --go "$SCRATCH/seven-go" &
seven=$!
wait $small
kill $nap 2> /dev/null
wait $model
for _ in $(seq 60); do [ -z "${BEFORE_TURNS:-}" ] || [ -e "$BEFORE_TURNS" ] && break; sleep 1; done  # other work ends first
touch "$SCRATCH/turns-go"
wait $turns
touch "$SCRATCH/seven-go"
wait $seven
find "$SCRATCH" \( -name '*.log' -o -name times.jsonl \) -print0 | tar czf "$OUT/logs.tgz" --null -T - 2> /dev/null
du -sm "$SCRATCH" >> "$OUT/two.txt" 2> /dev/null
say "over"
touch "$OUT/done"
