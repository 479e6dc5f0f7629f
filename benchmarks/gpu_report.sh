#!/usr/bin/env bash
# Build, test, sanitize, time and profile on a machine with an NVIDIA GPU, without a network, in nine minutes.
#
#     benchmarks/gpu_report.sh [DIR]         report.md and results.tar.gz to DIR (default: $OUT, else build/gpu_report)
#     benchmarks/gpu_report.sh --cpu [DIR]   the parts that need no GPU
#     benchmarks/gpu_report.sh --no-build .. measure what is built already
#     benchmarks/gpu_report.sh --only PARTS  some parts, with commas between
#     benchmarks/gpu_report.sh --wheels DIR  put these wheels on the path first: what the machine lacks
#
# Uses the torch of $PYTHON (default: python3) and installs nothing but this package, into its own checkout. Every
# part has a time limit; one that fails is recorded in the report, and the rest goes on. Results are written after
# every part, so that a run that is cut off leaves what it had.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

limit=530  # seconds for everything
build_limit=${BUILD_SECONDS:-170}
python=${PYTHON:-python3}
device=auto
build=yes
target=
only=()
wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) device=cpu ;;
        --no-build) build=no ;;
        --only)
            only=(--only "${2:?--only needs the names of parts}")
            shift
            ;;
        --wheels)
            wheels=${2:?--wheels needs a folder}
            shift
            ;;
        -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "error: unknown option $1; there are --cpu, --no-build, --only, --wheels" >&2; exit 2 ;;
        *) target=$1 ;;
    esac
    shift
done
target=${target:-${OUT:-build/gpu_report}}
work=build/gpu_report/parts
rm -rf build/gpu_report
mkdir -p "$work/logs" "$target" || exit 1

if ! "$python" -c 'import torch' 2> "$work/logs/torch.log"; then
    echo "error: $python has no torch: $(tail -n 1 "$work/logs/torch.log"); set PYTHON" >&2
    exit 1
fi
if [ "$device" = auto ]; then
    device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    [ "$device" = cuda ] || echo "torch sees no GPU here: the parts for a CPU run, which say nothing of the CUDA kernels"
fi

{
    date -u
    uname -a
    nvidia-smi
    nvcc --version
    cmake --version
    "$python" -m pip list
} > "$work/logs/environment.log" 2>&1 || true  # what is not there says so in the log

# Compile for this GPU alone: three architectures take three times as long.
if [ "$device" = cuda ]; then
    CUDAARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export CUDAARCHS
    export GROUPVIT_CUDA=1
fi
# An environment that its distribution manages refuses pip otherwise; this writes a link to this checkout, no more.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-deps --target build/gpu_report/site "$wheels"/*.whl > "$work/logs/wheels.log" 2>&1 \
        || echo "the wheels of $wheels were not installed: $(tail -n 1 "$work/logs/wheels.log")"
    export PYTHONPATH=$PWD/build/gpu_report/site:$PYTHONPATH
fi

record() {  # name, status, seconds, why
    printf '{"%s": {"status": "%s", "seconds": %d, "why": "%s"}}\n' "$@" > "$work/parts.json"
}

if [ "$build" = no ]; then
    record build "left out" 0 "asked for with --no-build"
else
    printf 'build ... '
    log=$work/logs/build.log
    timeout --kill-after=5 "$build_limit" \
        "$python" -m pip install --no-build-isolation --no-deps --editable . > "$log" 2>&1
    status=$?
    if [ "$status" -ne 0 ] && [ "$SECONDS" -lt "$build_limit" ]; then
        echo "pip could not; compiling in place" >> "$log"
        timeout --kill-after=5 $((build_limit - SECONDS)) "$python" setup.py build_ext --inplace >> "$log" 2>&1
        status=$?
    fi
    case $status in
        0) record build "done" "$SECONDS" "" ;;
        124 | 137) record build "cut off" "$SECONDS" "longer than $build_limit s" ;;
        *) record build "failed" "$SECONDS" "status $status, see logs/build.log" ;;
    esac
    printf '%d s, status %d\n' "$SECONDS" "$status"
fi

minutes=$("$python" -c "print(($limit - $SECONDS) / 60)")
# One minute more than it gives itself: a hanging driver must not take the results along.
timeout --kill-after=5 $((limit - SECONDS + 60)) \
    "$python" benchmarks/bench.py --device "$device" --output "$work" --minutes "$minutes" --pack "$target" \
    ${only[@]+"${only[@]}"}
status=$?
[ "$status" -eq 0 ] || echo "the measurements ended with status $status; $target holds what was done until then"
echo "everything took $SECONDS s"
exit "$status"
