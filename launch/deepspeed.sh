#!/usr/bin/env bash
# Train on the hosts of a hostfile through DeepSpeed's launcher, and restart after failures; see `--help`.

usage() {
    cat <<'HELP'
usage: launch/deepspeed.sh HOSTFILE CONFIG.yaml [section.key=value ...]

Starts one rank per slot on the hosts of HOSTFILE (lines `HOST slots=N`, see hostfile.example). All hosts need the
project folder and run.dir under the same paths, and ssh from this machine without a password. Relative paths in the
config and on the command line are relative to the project folder; HOSTFILE and CONFIG.yaml are also looked up in the
current folder.

Ctrl-C, SIGTERM, SIGUSR1 or a file run.dir/STOP stop the run after its current step, with a checkpoint; a second Ctrl-C
or SIGTERM kills it. After a failure, all remaining processes of the run are killed on all hosts, and it restarts from
the newest checkpoint, waiting for hosts that are down. Environment variables:

  LAUNCHER       pdsh (default), mpich, openmpi, or slurm (inside salloc, without ssh)
  LAUNCHER_ARGS  more options for the launcher
  MAX_FAILURES   consecutive failures without a new checkpoint after which it is not restarted (3)
  HOSTS_WITHIN   seconds to wait for hosts that are down before a restart (600)
  PYTHON         the interpreter on all hosts (.venv/bin/python of the project)
  MASTER_ADDR    address of the first host for the others, if it differs from its name in HOSTFILE

Variables that begin with NCCL_, GLOO_, TORCH_, UCX_, FI_, OMP_, WANDB_ or HF_, and those of launch/env.sh, are passed
to all ranks. Keys and tokens are not, because they would be visible in process lists.

Exit codes: 0 the run is done; 85 stopped, the same command resumes; 2 configuration or input error; 3 a host is unfit;
5 training diverged; others: of the last failure.
HELP
}

log() { printf 'launch %(%F %T)T: %s\n' -1 "$*"; }
fail() { # EXIT_CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}
resolve() { # PATH: absolute if the file exists relative to the current folder
    if [[ -f $1 ]]; then realpath "$1"; else echo "$1"; fi
}
run_allocation() { "$python" -m mythos_dist.ops.cluster.allocation "$config" "$@"; }
# Bash arithmetic runs commands in array subscripts, so numbers from files and variables are checked first.
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }
# Launchers put these values into command lines for shells on other hosts, and not all launchers quote them.
check_plain() { # NAME VALUE
    [[ ! $2 =~ [^[:alnum:]_@%+=:,./-] && $2 != -* ]] || fail 2 "$1=$2: launchers pass it to shells on other hosts; \
use only letters, digits and _@%+=:,./-"
}
is_completed() { [[ -e $run_dir/COMPLETED ]] && run_allocation --completed; }

# --- Hosts

# By default ssh, and the program that runs it, waits forever for a host that has lost power.
ssh_options='-o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'

# Runs bash with the script on standard input and these arguments.
on_host() { # HOST [ARGUMENT ...]
    if [[ $launcher == slurm ]]; then
        srun --overlap --quiet --nodes=1 --ntasks=1 --nodelist="$1" bash -s -- "${@:2}"
    else
        ssh -o BatchMode=yes $ssh_options -- "$1" "bash -s -- $(printf '%q ' "${@:2}")"
    fi
}
on_all_hosts() { # SCRIPT [ARGUMENT ...]: in parallel; prints the hosts where it fails
    local host running=()
    for host in "${hosts[@]}"; do
        { on_host "$host" "${@:2}" <<<"$1" >/dev/null 2>&1 || echo "$host"; } &
        running+=($!)
    done
    wait "${running[@]}"
}

check_launcher() {
    local program
    case $launcher in
    pdsh) program=pdsh ;;
    slurm) program=srun ;;
    mpich | openmpi) program=mpirun ;;
    *) fail 2 "LAUNCHER=$launcher; set it to one of pdsh, mpich, openmpi, slurm" ;;
    esac
    command -v "$program" >/dev/null || fail 2 "LAUNCHER=$launcher needs $program, which is not installed here"
    [[ $launcher != slurm || ${SLURM_JOB_ID:-} ]] ||
        fail 2 "LAUNCHER=slurm needs an allocation; run it in salloc --nodes=${#hosts[@]} \
--ntasks-per-node=$ranks_per_node, or use launch/slurm.sbatch"
}

missing_hosts() { # on one line
    on_all_hosts 'cd "$1" && [[ -x $2 && -r $3 ]]' "$project" "$python" "$config" | paste -sd' '
}

wait_for_hosts() { # a host that is down may be rebooting
    local begin=$SECONDS missing
    while missing=$(missing_hosts) && [[ $missing ]]; do
        ((SECONDS - begin < HOSTS_WITHIN)) || fail 3 "unreachable for $HOSTS_WITHIN s: $missing; repair the host, or \
remove it from $hostfile"
        log "unreachable: $missing; waiting"
        sleep 10
        [[ ! -e $run_dir/STOP ]] || return
    done
    ((SECONDS == begin)) || kill_remaining # a host that was cut off, not down, may still run ranks
}

# Processes of this launch have its name in their environment. Others of the same user, and shells that only have the
# name in their command line, are not killed.
kill_remaining() {
    local unreached
    unreached=$(on_all_hosts 'for file in /proc/[0-9]*/environ; do
        pid=${file#/proc/}
        if grep -qzxF "MYTHOS_LAUNCH=$1" "$file" 2>/dev/null; then kill -KILL "${pid%/environ}"; fi
    done; true' "$launch")
    [[ -z $unreached ]] || log "unreachable, ranks may still be running there: $(paste -sd' ' <<<"$unreached")"
}

# --- One start

choose_port() { # below the ephemeral ports
    MASTER_PORT=$((10000 + RANDOM % 20000))
    while timeout 2 bash -c ': <"/dev/tcp/$1/$2"' bash "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null; do
        ((MASTER_PORT += 1))
    done
}

# pdsh and mpirun pass no variables on; DeepSpeed passes on those in this file.
write_env_file() {
    local name value names
    names=$(compgen -e | grep -E '^(NCCL|GLOO|TORCH|UCX|FI|OMP|WANDB|HF)_|^LD_LIBRARY_PATH$' |
        grep -vE 'KEY|TOKEN|SECRET')
    for name in $(printf '%s\n' $names "${env_names[@]}" MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE MYTHOS_LAUNCH \
        MYTHOS_BAD_NODES MYTHOS_VERDICT MYTHOS_SECRET_FILE \
        ${MYTHOS_CHECKPOINT_KEY_FILE:+MYTHOS_CHECKPOINT_KEY_FILE} | sort -u); do
        value=${!name}
        # DeepSpeed quotes values with other characters, and not all launchers remove the quotes.
        if [[ $value =~ [^[:alnum:]_@%+=:,./-] ]]; then
            log "$name=$value is not passed to the ranks: LAUNCHER=$launcher would change its characters" >&2
        else
            echo "$name=$value"
        fi
    done >"$DS_ENV_FILE"
}

start() { # start DeepSpeed's launcher in the background: $launched
    local more='' options=(
        --hostfile="$run_dir/launch/hostfile" --launcher="$launcher" --master_addr="$MASTER_ADDR" --force_multi --log_level=warning
    )
    choose_port
    options+=(--master_port="$MASTER_PORT")
    case $launcher in
    # DeepSpeed's slurm launcher drops --module, so `-m` is passed in place of the script's name.
    slurm) more="--nodes=${#hosts[@]} --ntasks-per-node=$ranks_per_node --nodelist=$(IFS=, && echo "${hosts[*]}") \
--kill-on-bad-exit=1 --label" program=(-- -m mythos_dist.train) ;;
    # Its mpich launcher applies --module to a helper script of its own, which is not a module. PYTHONSAFEPATH keeps the
    # folder of the script out of sys.path (Python 3.11 and newer).
    mpich) program=("$project/mythos_dist/train/__main__.py") && export PYTHONSAFEPATH=1 ;;
    pdsh) program=(--module --no_local_rank mythos_dist.train) ;;
    openmpi) program=(--module mythos_dist.train) ;;
    esac
    more+=" ${LAUNCHER_ARGS:-}"
    rm -f "$MYTHOS_BAD_NODES" "$MYTHOS_VERDICT"
    MYTHOS_LAUNCH=$launch write_env_file
    # In its own session, so that only this script gets Ctrl-C.
    MYTHOS_LAUNCH=$launch setsid "$python" -m deepspeed.launcher.runner "${options[@]}" --launcher_args="${more# }" \
        "${program[@]}" "$config" &
    launched=$!
}

stopping='' interrupted='' launched=''
handle_signal() { # NAME
    interrupted=yes
    if [[ $stopping == [IT]* && $1 == [IT]* ]]; then # the second INT or TERM
        log "killing the run"
        trap '' INT TERM
        kill_remaining
        kill -KILL -- "-$launched"
        return
    fi
    [[ $stopping ]] || log "SIG$1: the run stops after the current step (press Ctrl-C again to kill it)"
    stopping=$1 # before `touch`, which a second signal may interrupt
    touch "$run_dir/STOP"
}

wait_for_launcher() { # exit_code
    while :; do
        interrupted=''
        wait "$launched" # a signal interrupts `wait`, but does not end the launcher
        exit_code=$?
        [[ $interrupted ]] || break
    done
}

# --- After a start

decide_next() { # returns if the run is to be restarted
    if is_completed; then
        log "the run is done"
        exit 0
    fi
    kill_remaining
    # Launchers return 0 when they are killed, or the exit code of ranks that they killed. The ranks' own report has
    # precedence.
    local reported=''
    [[ ! -s $MYTHOS_VERDICT ]] || read -r reported <"$MYTHOS_VERDICT"
    ! is_number "$reported" || exit_code=$reported
    if [[ -s $MYTHOS_BAD_NODES ]]; then
        fail 3 "unfit nodes: $(sort -u "$MYTHOS_BAD_NODES" | paste -sd' '); repair them, or remove them from $hostfile"
    elif ((exit_code == 2 || exit_code == 5)); then
        exit "$exit_code" # the ranks have printed the reason
    elif ((exit_code == 85)); then
        log "stopped; the same command resumes the run"
        exit 85
    fi
    ((exit_code)) || exit_code=1
    [[ -z $stopping ]] || fail "$exit_code" "ended without a checkpoint of the last step; the same command resumes"
    count_failure
}

count_failure() {
    local newest
    newest=$(cat "$run_dir/checkpoints/latest" 2>/dev/null)
    [[ $newest == "${before-$newest}" ]] || failures=0
    before=$newest
    ((failures += 1))
    log "exit code $exit_code: failure $failures of $MAX_FAILURES without a new checkpoint"
    ((failures < MAX_FAILURES)) || fail "$exit_code" "not restarted; see $run_dir/logs"
}

# --- Before the first start

read_settings() { # HOSTFILE CONFIG.yaml
    launcher=${LAUNCHER:-pdsh} failures=0
    hostfile=$(resolve "$1") config=$(resolve "$2")
    cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." || exit
    project=$PWD
    hostfile=$(realpath -m "$hostfile")
    python=${PYTHON:-$project/.venv/bin/python}
    export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
    : "${MAX_FAILURES:=3}" "${HOSTS_WITHIN:=600}"
    local name
    for name in MAX_FAILURES HOSTS_WITHIN; do
        is_number "${!name}" || fail 2 "$name=${!name} is not a number"
    done
    run_dir=$(run_allocation "${overrides[@]}" --hostfile="$hostfile") || exit
    run_dir=$(realpath -m "$run_dir")
    check_plain PYTHON "$python"
    check_plain "the project folder" "$project"
    check_plain run.dir "$run_dir"
    check_plain MASTER_ADDR "${MASTER_ADDR:-}"
}

write_inputs() { # what the launcher and the ranks read: a hostfile and a config
    mkdir -p "$run_dir/launch"
    # The hosts that were checked: DeepSpeed parses hostfiles differently.
    run_allocation "${overrides[@]}" --hosts="$hostfile" >"$run_dir/launch/hostfile" || exit
    mapfile -t hosts < <(sed 's/ slots=.*//' "$run_dir/launch/hostfile")
    ranks_per_node=$(sed -n '1s/.*slots=//p' "$run_dir/launch/hostfile")
    # Overrides are in this file because shells and launchers would split them at braces and spaces.
    run_allocation "${overrides[@]}" --write="$run_dir/launch/config.yaml" || exit
    config=$run_dir/launch/config.yaml
}

check_hosts() { # and count the cores of the first one, which may differ from this machine
    check_launcher
    local missing
    missing=$(missing_hosts)
    [[ -z $missing ]] || fail 2 "$missing: unreachable without a password, or $project, $python or $config does not \
exist there; try \`ssh HOST ls $project\`, and share the folder"
    cores=$(on_host "${hosts[0]}" <<<nproc)
    is_number "$cores" || cores=1
}

export_variables() {
    source launch/env.sh
    unset MYTHOS_LAUNCH
    launch=$(hostname)-$$-$(date +%s)
    export MYTHOS_BAD_NODES=$run_dir/launch/bad_nodes MYTHOS_VERDICT=$run_dir/launch/verdict DS_ENV_FILE
    export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}} MASTER_PORT LOCAL_WORLD_SIZE=$ranks_per_node MYTHOS_SECRET_FILE
    make_secret
    DS_ENV_FILE=$(mktemp)
    export PDSH_SSH_ARGS_APPEND="$ssh_options ${PDSH_SSH_ARGS_APPEND:-}"
    export HYDRA_LAUNCHER_EXTRA_ARGS=$ssh_options OMPI_MCA_plm_rsh_args=$ssh_options # mpich, openmpi
}

# Ranks of this launch authenticate each other with it. In a file, because launchers put the environment into command
# lines.
make_secret() {
    MYTHOS_SECRET_FILE=$run_dir/launch/secret-$launch
    (umask 077 && head -c 32 /dev/urandom | base64 >"$MYTHOS_SECRET_FILE")
    if [[ $(stat -c %a "$MYTHOS_SECRET_FILE") != 600 ]]; then
        log "the file system of $run_dir does not protect files from other users: ranks do not authenticate each other"
        rm -f "$MYTHOS_SECRET_FILE" && unset MYTHOS_SECRET_FILE
    fi
}

clean_up() { # a STOP file that was not handled must not stop the next start
    rm -f "$DS_ENV_FILE" ${MYTHOS_SECRET_FILE:+"$MYTHOS_SECRET_FILE"} "$run_dir/STOP"
}

main() {
    [[ ${1:-} != --help && ${1:-} != -h ]] || { usage && exit 0; }
    (($# >= 2)) || fail 2 "launch/deepspeed.sh needs a hostfile and a config; see --help"
    overrides=("${@:3}")
    read_settings "$1" "$2"
    write_inputs
    if is_completed; then
        log "the run in $run_dir is already done"
        exit 0
    fi
    check_hosts
    export_variables
    rm -f "$run_dir/STOP"
    trap clean_up EXIT
    local signal
    for signal in INT TERM USR1 HUP; do
        trap "handle_signal $signal" "$signal"
    done
    while :; do
        log "starting on ${#hosts[@]} hosts x $ranks_per_node ranks with $launcher, run $run_dir"
        start
        wait_for_launcher
        decide_next
        wait_for_hosts
        [[ ! -e $run_dir/STOP ]] || { log "stopped" && exit 85; }
    done
}

main "$@"
