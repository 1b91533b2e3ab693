# What launch scripts put into every rank's environment, and why. Sourced by them, not run; what is set already stays,
# so for one run set a variable before you submit. They have set ranks_per_node, run_dir and, for another node, cores.
#
# Not here: which network interface NCCL and gloo use. Each node finds the one that leads to rank 0 when training
# starts, since names differ from node to node; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME count where you set them.
# mosaicml-streaming, tokenizers and the Hugging Face hub need nothing: training reads shards by index from their files.

# NCCL is silent by default: WARN says why a communicator could not be made. INFO tells links and rings too.
: "${NCCL_DEBUG:=WARN}"
# When a collective of NCCL times out or fails, each rank writes the last 2000 of them to logs/nccl-rank-N, for
# `torchfrtrace`: who was missing? By default they go below the home, where the ranks of all runs have one file each.
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
: "${TORCH_FR_DUMP_TEMP_FILE:=$run_dir/logs/nccl-rank-}"

# torch starts as many threads as there are cores, in every rank; with eight ranks on a node they would fight.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-$((${cores:-$(nproc)} / ranks_per_node))}
    ((OMP_NUM_THREADS >= 1)) || OMP_NUM_THREADS=1
fi

: "${PYTHONUNBUFFERED:=1}" # the last lines before a crash reach the log
: "${PYTHONFAULTHANDLER:=1}" # a segmentation fault leaves the stacks of all threads

# Compiled kernels, on a disk of the node's own: by default they go below the home, and on a shared one hundreds of
# ranks wait for each other's locks.
#
# Anybody can make a folder of this name, and what lies in it is run: every rank looks whose it is on its own node before
# it compiles anything, and so does this script here (mythos_dist/private.py).
local_disk=${TMPDIR:-/tmp}/mythos_dist-$(id -u)
: "${TRITON_CACHE_DIR:=$local_disk/triton}"
: "${TORCH_EXTENSIONS_DIR:=$local_disk/torch_extensions}" # what DeepSpeed compiles
: "${TORCHINDUCTOR_CACHE_DIR:=$local_disk/inductor}" # what train.compile compiles; by default /tmp/torchinductor_USER
own_folder() { # FOLDER: made if it is not there; else it must be ours alone
    mkdir -m 700 -p "$1" 2>/dev/null
    [[ -d $1 && ! -L $1 && -O $1 ]] && ! (($(stat -c 0%a "$1") & 022)) && return
    echo "error: $1 is no folder that is yours and that nobody else can write into; look at what is there, remove it, \
or set TMPDIR to a folder of yours" >&2
    return 1
}
if [[ "$TRITON_CACHE_DIR $TORCH_EXTENSIONS_DIR $TORCHINDUCTOR_CACHE_DIR" == *"$local_disk"/* ]]; then
    own_folder "$local_disk" || exit 2
fi

env_names=(
    NCCL_DEBUG TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_DUMP_TEMP_FILE OMP_NUM_THREADS PYTHONUNBUFFERED PYTHONFAULTHANDLER
    TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR
)
export "${env_names[@]}"
