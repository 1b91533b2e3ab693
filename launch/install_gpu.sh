#!/usr/bin/env bash
# Build the GPU packages for the installed torch; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: bash launch/install_gpu.sh [--only PACKAGE,...] [--force] [--dry-run] [--build-dir DIR]

Builds stanford-stk, grouped_gemm, megablocks and flash-attn from source for the installed torch. The interpreter is the
first of: $PYTHON, the active virtual environment, .venv of this repository, python3. No other package changes. Then
checks that each package can be imported and, if there is a GPU, that its results equal plain torch's. Packages that are
installed in the right version are skipped, so the script can be rerun.

  --only PACKAGE,...  only these: the first three for experts.backend=megablocks, the last for train.attention
  --force             rebuild installed packages
  --dry-run           check the prerequisites and print the plan; download and change nothing
  --build-dir DIR     for sources and the log (default: ~/.cache/mythos_dist/gpu_build)

flash-attn takes long: 72 CUDA files for each compute capability. Environment variables:

  CUDA_HOME              CUDA toolkit; its major version must be torch's
  TORCH_CUDA_ARCH_LIST   compute capabilities (default: those of this machine's GPUs, without any "8.0;9.0;10.0")
  MAX_JOBS               parallel compilers (default: one per core, at most one per 9 GiB of free memory)
  GROUPED_GEMM_CUTLASS   1: one kernel for all experts (default if all GPUs are 8.x); 0: one cuBLAS call per expert
  CXX                    C++ compiler (default: g++)

Exit code 0: success. 1: a build or a check failed; see the log. 2: a prerequisite is missing.
HELP
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
packages=(stanford-stk grouped_gemm megablocks flash-attn)
chosen=("${packages[@]}")
force=false dry_run=false
build_dir=${XDG_CACHE_HOME:-$HOME/.cache}/mythos_dist/gpu_build
problems=()

problem() { problems+=("$1"); }

stop_if_problems() {
    ((${#problems[@]})) || return 0
    if ((${#problems[@]} == 1)); then
        echo "error: ${problems[0]}" >&2
    else
        echo "error: ${#problems[@]} problems" >&2
        printf '  %s\n' "${problems[@]}" >&2
    fi
    exit 2
}

read_arguments() {
    while (($#)); do
        case $1 in
        --help | -h) usage && exit 0 ;;
        --force) force=true ;;
        --dry-run) dry_run=true ;;
        --only | --build-dir)
            if (($# < 2)); then
                problem "$1 needs a value; see --help"
            elif [[ $1 == --only ]]; then
                IFS=, read -ra chosen <<<"$2"
            else
                build_dir=$2
            fi
            shift $(($# > 1)) ;;
        *) problem "unknown argument $1; see --help" ;;
        esac
        shift
    done
    local name
    for name in "${chosen[@]}"; do
        [[ " ${packages[*]} " == *" $name "* ]] || problem "--only $name: unknown package; choose from ${packages[*]}"
    done
    stop_if_problems
}

# Sets torch_version, torch_cuda, archs_here and cuda_headers from the interpreter's torch; empty if unknown.
find_torch() {
    python=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
    if [[ -z $python ]]; then
        python=$here/../.venv/bin/python
        [[ -x $python ]] || python=python3
    fi
    torch_version='' torch_cuda='' archs_here='' cuda_headers=''
    if ! command -v "$python" >/dev/null; then
        problem "no Python at $python; set PYTHON, or activate the environment with torch"
        return
    fi
    "$python" -m pip --version >/dev/null 2>&1 || problem "$python has no pip; run $python -m ensurepip"
    local answer
    if ! answer=$("$python" - 2>&1 <<'PY'
import sys, pathlib, torch
found = torch.cuda.is_available()
archs = {"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} if found else set()
headers = [p.parent for path in sys.path for p in pathlib.Path(path or ".").glob("nvidia/*/include/cusparse.h")]
print(torch.__version__, torch.version.cuda or "none", ";".join(sorted(archs, key=float)) or "none", *headers[:1])
PY
    ); then
        problem "torch cannot be imported by $python: ${answer##*$'\n'}; install torch first"
        return
    fi
    read -r torch_version torch_cuda archs_here cuda_headers <<<"${answer##*$'\n'}"
    archs_here=${archs_here#none}
    [[ $torch_cuda != none ]] ||
        problem "torch $torch_version is built without CUDA; install a build with CUDA (see pytorch.org)"
}

# Sets cuda_home and nvcc_version. nvcc on the PATH may be a wrapper in another folder: `nvcc --dryrun` prints its toolkit.
find_cuda() {
    cuda_home=${CUDA_HOME:-} nvcc_version=''
    local nvcc want=${torch_cuda:-13}
    [[ $want != none ]] || want=13
    if [[ -n $cuda_home ]]; then
        nvcc=$cuda_home/bin/nvcc
        [[ -x $nvcc ]] || { problem "CUDA_HOME=$cuda_home has no bin/nvcc; set it to a CUDA $want toolkit"; return; }
    elif ! nvcc=$(command -v nvcc); then
        problem "nvcc is not on the PATH and CUDA_HOME is not set; install the CUDA $want toolkit, or load its module"
        return
    else
        cuda_home=$("$nvcc" --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
        [[ -n $cuda_home ]] || cuda_home=$(dirname "$nvcc")/..
        cuda_home=$(cd "$cuda_home" && pwd -P)
    fi
    nvcc_version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    if [[ -n $torch_cuda && $torch_cuda != none && ${nvcc_version%%.*} != "${torch_cuda%%.*}" ]]; then
        problem "nvcc belongs to CUDA ${nvcc_version:-(unknown)}, but torch $torch_version is built with CUDA $torch_cuda; \
set CUDA_HOME to a CUDA ${torch_cuda%%.*} toolkit"
    fi
    # A minimal toolkit has the compiler but not the libraries' headers; torch's own packages have these.
    if [[ ! -e $cuda_home/include/cusparse.h ]]; then
        if [[ -n $cuda_headers ]]; then
            export CPATH=$cuda_headers${CPATH:+:$CPATH}
        else
            problem "CUDA_HOME=$cuda_home has no include/cusparse.h; install the toolkit's development libraries too"
        fi
    fi
}

# Sets archs, flash_archs, jobs and cutlass, from the environment or for this machine.
choose_settings() {
    archs=${TORCH_CUDA_ARCH_LIST:-${archs_here:-8.0;9.0;10.0}}
    archs=${archs// /;}
    local arch memory majors=()
    for arch in ${archs//;/ }; do
        if [[ $arch =~ ^([0-9]+)\.[0-9][a-f]?(\+PTX)?$ ]]; then
            majors+=("${BASH_REMATCH[1]}")
            ((BASH_REMATCH[1] >= 8)) || problem "TORCH_CUDA_ARCH_LIST=$archs: $arch has no bf16; use 8.0 and newer"
        else
            problem "TORCH_CUDA_ARCH_LIST=$archs: $arch is not a compute capability; write it like 8.0;9.0"
        fi
    done
    ((${#majors[@]})) || majors=(0)
    # flash-attn supports 80, 90, 100 and 120; code for x.0 runs on all of x.
    flash_archs=$(printf '%s0\n' "${majors[@]}" | sort -nu | tr '\n' ';')
    flash_archs=${flash_archs%;}
    cutlass=0
    [[ $flash_archs != 80 ]] || cutlass=1
    cutlass=${GROUPED_GEMM_CUTLASS:-$cutlass}
    [[ $cutlass == [01] ]] || problem "GROUPED_GEMM_CUTLASS=$cutlass: set it to 0 or 1"
    memory=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo)
    jobs=$((${memory:-9437184} / 9437184)) # 9 GiB per compiler, as in flash-attn's setup.py
    ((jobs <= $(nproc))) || jobs=$(nproc)
    ((jobs >= 1)) || jobs=1
    jobs=${MAX_JOBS:-$jobs}
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || problem "MAX_JOBS=$jobs: set it to a number of at least 1"
    compiler=${CXX:-g++}
    command -v "$compiler" >/dev/null ||
        problem "no C++ compiler: $compiler is not on the PATH; install g++, or set CXX"
}

# Sets to_build and prints the plan.
print_plan() {
    local missing name reason
    missing=$("$python" "$here/check_gpu.py" --missing "${chosen[@]}")
    echo "python    $python, torch $torch_version"
    echo "toolkit   $cuda_home, CUDA $nvcc_version${CPATH:+, headers from $CPATH}"
    echo "compiler  $compiler, $jobs at a time (MAX_JOBS)"
    echo "GPUs      $archs (TORCH_CUDA_ARCH_LIST)$([[ -n $archs_here ]] || echo '; no GPU here')"
    echo "log       $build_dir/install_gpu.log"
    to_build=()
    for name in "${chosen[@]}"; do
        reason=$(sed -n "s/^$name //p" <<<"$missing")
        if [[ -n $reason ]] || $force; then
            to_build+=("$name")
            echo "build     $name: ${reason:-is installed, but --force is set}"
        else
            echo "skip      $name: is installed"
        fi
    done
    local products=('one cuBLAS call per expert' 'one kernel for all experts')
    [[ " ${to_build[*]:-} " != *" grouped_gemm "* ]] ||
        echo "          GROUPED_GEMM_CUTLASS=$cutlass: ${products[cutlass]}"
}

log_line() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" | tee -a "$log"; }

# Run a command with its output in the log; on failure show the end of it.
logged() {
    printf '+ %s\n' "$*" >>"$log"
    if ! "$@" >>"$log" 2>&1; then
        log_line "failed: $*"
        tail -n 25 "$log" >&2
        echo "error: see $log" >&2
        exit 1
    fi
}

build() {
    export CUDA_HOME=$cuda_home TORCH_CUDA_ARCH_LIST=$archs MAX_JOBS=$jobs NVCC_THREADS=${NVCC_THREADS:-2}
    export GROUPED_GEMM_CUTLASS=$cutlass FLASH_ATTN_CUDA_ARCHS=$flash_archs
    # Otherwise flash-attn first looks for a wheel on GitHub, which our hashes do not cover.
    export FLASH_ATTENTION_FORCE_BUILD=${FLASH_ATTENTION_FORCE_BUILD:-TRUE}
    logged "$python" -m pip install setuptools wheel ninja packaging psutil einops
    local pin
    for name in "${to_build[@]}"; do
        log_line "$name: source"
        logged "$python" "$here/gpu_sources.py" "$build_dir" "$name"
        pin=$(sed -n "s/^$name==\([^ ]*\).*/\1/p" "$here/gpu_packages.txt")
        log_line "$name: build"
        logged "$python" -m pip install --verbose --no-deps --no-build-isolation --force-reinstall \
            "$build_dir/${name//-/_}-$pin"
    done
}

main() {
    read_arguments "$@"
    export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # the helpers import mythos_dist
    find_torch
    find_cuda
    choose_settings
    stop_if_problems
    print_plan
    if $dry_run; then return; fi
    log=$build_dir/install_gpu.log
    mkdir -p "$build_dir"
    if ((${#to_build[@]})); then build; fi
    log_line "check"
    if ! "$python" "$here/check_gpu.py" "${chosen[@]}" 2>>"$log" | tee -a "$log"; then
        echo "error: a check failed; see $log" >&2
        exit 1
    fi
}

main "$@" # at the end, so that bash has read the whole file before a long build begins
exit
