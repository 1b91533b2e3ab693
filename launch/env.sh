# Environment variables that the launch scripts set for all ranks, and why. The scripts source this file. Variables that
# are already set keep their values. The scripts have set ranks_per_node, run_dir and, for another node, cores.
#
# Not here: which network interface NCCL and gloo use. At the start of training each node finds the one that leads to
# rank 0, because names differ between nodes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME override that.
# mosaicml-streaming, tokenizers and the Hugging Face hub need no variables: training reads shards from their files.

# NCCL prints nothing by default. WARN gives the reason when a communicator cannot be created; INFO adds links, rings.
: "${NCCL_DEBUG:=WARN}"
# When an NCCL collective times out or fails, each rank writes its last 2000 collectives to logs/nccl-rank-N, which
# `torchfrtrace` analyzes. By default the files are in the home folder, where all runs overwrite each other's.
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
: "${TORCH_FR_DUMP_TEMP_FILE:=$run_dir/logs/nccl-rank-}"

# By default torch starts one thread per core in every rank, too many with several ranks on a node.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-$((${cores:-$(nproc)} / ranks_per_node))}
    ((OMP_NUM_THREADS >= 1)) || OMP_NUM_THREADS=1
fi

: "${PYTHONUNBUFFERED:=1}" # so that the last lines before a crash reach the log
: "${PYTHONFAULTHANDLER:=1}" # a segmentation fault prints the stacks of all threads

# Compiled kernels, on a local disk of the node: by default they are in the home folder, and on a shared file system
# hundreds of ranks wait for each other's locks.
#
# Other users could create this folder in advance, and its content is executed: every rank checks the owner on its node
# before it compiles anything (mythos_dist/private.py), and so does this script.
local_disk=${TMPDIR:-/tmp}/mythos_dist-$(id -u)
: "${TRITON_CACHE_DIR:=$local_disk/triton}"
: "${TORCH_EXTENSIONS_DIR:=$local_disk/torch_extensions}" # compiled by DeepSpeed
: "${TORCHINDUCTOR_CACHE_DIR:=$local_disk/inductor}" # compiled by train.compile; by default /tmp/torchinductor_USER
own_folder() { # FOLDER: create it if it does not exist; fail if other users can write to it
    mkdir -m 700 -p "$1" 2>/dev/null
    [[ -d $1 && ! -L $1 && -O $1 ]] && ! (($(stat -c 0%a "$1") & 022)) && return
    echo "error: $1 is not a folder that belongs to you and that only you can write to; check and remove it, or set \
TMPDIR to a folder of yours" >&2
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
