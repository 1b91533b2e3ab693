#!/usr/bin/env bash
# Train on the hosts of a hostfile through DeepSpeed's launcher, and start again after a failure; `--help` says more.

usage() {
    cat <<'HELP'
usage: launch/deepspeed.sh HOSTFILE CONFIG.yaml [section.key=value ...]

Starts one rank per slot on the hosts of HOSTFILE (lines `HOST slots=N`, see hostfile.example), which reach the project
folder and run.dir under the same paths and this machine's ssh without a password. Relative paths in the config and on
the command line count from the project folder; HOSTFILE and CONFIG.yaml may also lie where you are.

Ctrl-C, SIGTERM and SIGUSR1 stop the run behind its next step and a checkpoint, and so does a file run.dir/STOP; a
second Ctrl-C or SIGTERM kills it. After a failure all that is left of the run is killed on all hosts, and it starts
again from the newest checkpoint; a host that is down is waited for. From the environment:

  LAUNCHER       pdsh (default), mpich, openmpi, or slurm (inside salloc, without ssh)
  LAUNCHER_ARGS  more options for it
  MAX_FAILURES   in a row, without a new checkpoint in between: then it is not started again (3)
  HOSTS_WITHIN   seconds in which hosts that went down must be back for the next start (600)
  PYTHON         the interpreter on all hosts (.venv/bin/python of the project)
  MASTER_ADDR    how the others reach the first host, if not by its name in HOSTFILE

Variables that begin with NCCL_, GLOO_, TORCH_, UCX_, FI_, OMP_, WANDB_ or HF_ reach all ranks, as those of
launch/env.sh do; keys and tokens do not, because they could be read in the list of processes.

Exit code 0: the run is done. 85: it was stopped; the same command goes on. 2: something has to be mended, and what. 3:
a host is unfit. 5: training diverged. Others: the last failure.
HELP
}

say() { printf 'launch %(%F %T)T: %s\n' -1 "$*"; }
fail() { # EXIT_CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}
found_from_here() { # PATH: absolute if there is such a file where the user is
    if [[ -f $1 ]]; then realpath "$1"; else echo "$1"; fi
}
ask() { "$python" -m mythos_dist.ops.cluster.allocation "$config" "$@"; }
# What bash computes with may hold a command, so numbers from files and variables are looked at first.
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }
# Launchers put these words into command lines for shells on other hosts, and not all of them quote.
check_plain() { # NAME VALUE
    [[ ! $2 =~ [^[:alnum:]_@%+=:,./-] && $2 != -* ]] || fail 2 "$1=$2: launchers give it to shells on other hosts; \
use letters, digits and _@%+=:,./- only"
}
is_done() { [[ -e $run_dir/COMPLETED ]] && ask --finished; }

# --- The hosts

# Without these ssh waits for ever for a host that has lost its power, and whoever started it too.
ssh_options='-o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'

# Runs bash with the script on standard input; arguments go to the script.
on_host() { # HOST [ARGUMENT ...]
    if [[ $launcher == slurm ]]; then
        srun --overlap --quiet --nodes=1 --ntasks=1 --nodelist="$1" bash -s -- "${@:2}"
    else
        ssh -o BatchMode=yes $ssh_options -- "$1" "bash -s -- $(printf '%q ' "${@:2}")"
    fi
}
on_all_hosts() { # SCRIPT [ARGUMENT ...]: at the same time; prints the hosts where it fails
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
    command -v "$program" >/dev/null || fail 2 "LAUNCHER=$launcher, but there is no $program here; install it"
    [[ $launcher != slurm || ${SLURM_JOB_ID:-} ]] ||
        fail 2 "LAUNCHER=slurm works inside an allocation; start it from salloc --nodes=${#hosts[@]} \
--ntasks-per-node=$ranks_per_node, or use launch/slurm.sbatch"
}

missing_hosts() { # on one line
    on_all_hosts 'cd "$1" && [[ -x $2 && -r $3 ]]' "$project" "$python" "$config" | paste -sd' '
}

# A host that is down may be on its way up again.
wait_for_hosts() {
    local begin=$SECONDS missing
    while missing=$(missing_hosts) && [[ $missing ]]; do
        ((SECONDS - begin < HOSTS_WITHIN)) || fail 3 "not to be reached for $HOSTS_WITHIN s: $missing; mend it, or \
take it out of $hostfile"
        say "not to be reached: $missing; waiting"
        sleep 10
        [[ ! -e $run_dir/STOP ]] || return
    done
    ((SECONDS == begin)) || kill_leftovers # of a host that was cut off, not down
}

# What belongs to this launch has its name in the environment: no other process of the user is meant, and neither is a
# shell that only speaks of it.
kill_leftovers() {
    local unreached
    unreached=$(on_all_hosts 'for file in /proc/[0-9]*/environ; do
        pid=${file#/proc/}
        if grep -qzxF "MYTHOS_LAUNCH=$1" "$file" 2>/dev/null; then kill -KILL "${pid%/environ}"; fi
    done; true' "$launch")
    [[ -z $unreached ]] || say "not reached, ranks may go on there: $(paste -sd' ' <<<"$unreached")"
}

# --- One start

choose_port() { # below the ports that kernels give to outgoing connections
    MASTER_PORT=$((10000 + RANDOM % 20000))
    while timeout 2 bash -c ': <"/dev/tcp/$1/$2"' bash "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null; do
        ((MASTER_PORT += 1))
    done
}

# pdsh and mpirun pass no variables on; DeepSpeed passes on those of this file.
write_env_file() {
    local name value theirs
    theirs=$(compgen -e | grep -E '^(NCCL|GLOO|TORCH|UCX|FI|OMP|WANDB|HF)_|^LD_LIBRARY_PATH$' |
        grep -vE 'KEY|TOKEN|SECRET')
    for name in $(printf '%s\n' $theirs "${env_names[@]}" MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE MYTHOS_LAUNCH \
        MYTHOS_BAD_NODES MYTHOS_VERDICT MYTHOS_SECRET_FILE \
        ${MYTHOS_CHECKPOINT_KEY_FILE:+MYTHOS_CHECKPOINT_KEY_FILE} | sort -u); do
        value=${!name}
        # DeepSpeed puts values with other characters into quotes, and not all launchers take them off.
        if [[ $value =~ [^[:alnum:]_@%+=:,./-] ]]; then
            say "$name=$value does not reach the ranks: LAUNCHER=$launcher would change its characters" >&2
        else
            echo "$name=$value"
        fi
    done >"$DS_ENV_FILE"
}

start() { # starts DeepSpeed's launcher: $launched
    local more='' options=(
        --hostfile="$run_dir/launch/hostfile" --launcher="$launcher" --master_addr="$MASTER_ADDR" --force_multi --log_level=warning
    )
    choose_port
    options+=(--master_port="$MASTER_PORT")
    case $launcher in
    # DeepSpeed's slurm launcher drops --module, so `-m` goes in as if it were the name of the script.
    slurm) more="--nodes=${#hosts[@]} --ntasks-per-node=$ranks_per_node --nodelist=$(IFS=, && echo "${hosts[*]}") \
--kill-on-bad-exit=1 --label" program=(-- -m mythos_dist.train) ;;
    # Its mpich launcher takes --module for a helper of its own, too, which is none. The folder of a script is no place
    # to import from (Python 3.11 and newer).
    mpich) program=("$project/mythos_dist/train/__main__.py") && export PYTHONSAFEPATH=1 ;;
    pdsh) program=(--module --no_local_rank mythos_dist.train) ;;
    openmpi) program=(--module mythos_dist.train) ;;
    esac
    more+=" ${LAUNCHER_ARGS:-}"
    rm -f "$MYTHOS_BAD_NODES" "$MYTHOS_VERDICT"
    MYTHOS_LAUNCH=$launch write_env_file
    # In a session of its own, so that Ctrl-C reaches this script alone.
    MYTHOS_LAUNCH=$launch setsid "$python" -m deepspeed.launcher.runner "${options[@]}" --launcher_args="${more# }" \
        "${program[@]}" "$config" &
    launched=$!
}

stopping='' interrupted='' launched=''
on_signal() {
    interrupted=yes
    if [[ $stopping == [IT]* && $1 == [IT]* ]]; then # INT or TERM, both times
        say "killing the run"
        trap '' INT TERM
        kill_leftovers
        kill -KILL -- "-$launched"
        return
    fi
    [[ $stopping ]] || say "SIG$1: the run stops behind its next step (Ctrl-C, again, kills it)"
    stopping=$1 # first: a second signal may come while `touch` runs
    touch "$run_dir/STOP"
}

wait_for_it() { # exit_code
    while :; do
        interrupted=''
        wait "$launched" # a signal ends the waiting, but not the launcher
        exit_code=$?
        [[ $interrupted ]] || break
    done
}

# --- What next? Returns if the run shall start again.

decide() {
    if is_done; then
        say "the run is done"
        exit 0
    fi
    kill_leftovers
    # Launchers return 0 when they are killed, or what became of the ranks that they killed: the ranks' own word counts.
    local told=''
    [[ ! -s $MYTHOS_VERDICT ]] || read -r told <"$MYTHOS_VERDICT"
    ! is_number "$told" || exit_code=$told
    if [[ -s $MYTHOS_BAD_NODES ]]; then
        fail 3 "unfit: $(sort -u "$MYTHOS_BAD_NODES" | paste -sd' '); mend it, or take it out of $hostfile"
    elif ((exit_code == 2 || exit_code == 5)); then
        exit "$exit_code" # the run has said why
    elif ((exit_code == 85)); then
        say "stopped; the same command goes on"
        exit 85
    fi
    ((exit_code)) || exit_code=1
    [[ -z $stopping ]] || fail "$exit_code" "ended without a checkpoint of its last step; the same command goes on"
    count_failure
}

count_failure() {
    local newest
    newest=$(cat "$run_dir/checkpoints/latest" 2>/dev/null)
    [[ $newest == "${before-$newest}" ]] || failures=0
    before=$newest
    ((failures += 1))
    say "exit code $exit_code: failure $failures of $MAX_FAILURES without a new checkpoint"
    ((failures < MAX_FAILURES)) || fail "$exit_code" "not started again; see $run_dir/logs"
}

# By which the ranks of this launch know each other: in a file, because the environment goes through command lines.
make_secret() {
    MYTHOS_SECRET_FILE=$run_dir/launch/secret-$launch
    (umask 077 && head -c 32 /dev/urandom | base64 >"$MYTHOS_SECRET_FILE")
    if [[ $(stat -c %a "$MYTHOS_SECRET_FILE") != 600 ]]; then
        say "others can read files in $run_dir, whose file system has no modes: ranks trust whoever can reach them"
        rm -f "$MYTHOS_SECRET_FILE" && unset MYTHOS_SECRET_FILE
    fi
}

clean_up() {
    rm -f "$DS_ENV_FILE" ${MYTHOS_SECRET_FILE:+"$MYTHOS_SECRET_FILE"} "$run_dir/STOP" # a request that nobody is left to hear must not stop the next start
}

main() {
    [[ ${1:-} != --help && ${1:-} != -h ]] || { usage && exit 0; }
    (($# >= 2)) || fail 2 "launch/deepspeed.sh wants a hostfile and a config; see --help"
    overrides=("${@:3}") launcher=${LAUNCHER:-pdsh} failures=0
    hostfile=$(found_from_here "$1") config=$(found_from_here "$2")
    cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." || exit
    project=$PWD
    hostfile=$(realpath -m "$hostfile")
    python=${PYTHON:-$project/.venv/bin/python}
    export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
    : "${MAX_FAILURES:=3}" "${HOSTS_WITHIN:=600}"
    local name
    for name in MAX_FAILURES HOSTS_WITHIN; do
        is_number "${!name}" || fail 2 "$name=${!name}: set it to a number"
    done
    run_dir=$(ask "${overrides[@]}" --hostfile="$hostfile") || exit
    run_dir=$(realpath -m "$run_dir")
    check_plain PYTHON "$python"
    check_plain "the project folder" "$project"
    check_plain run.dir "$run_dir"
    check_plain MASTER_ADDR "${MASTER_ADDR:-}"
    mkdir -p "$run_dir/launch"
    # What was checked is what is used: DeepSpeed reads a hostfile by rules of its own.
    ask "${overrides[@]}" --hosts="$hostfile" >"$run_dir/launch/hostfile" || exit
    mapfile -t hosts < <(sed 's/ slots=.*//' "$run_dir/launch/hostfile")
    ranks_per_node=$(sed -n '1s/.*slots=//p' "$run_dir/launch/hostfile")
    # As one file: shells and launchers on the way would take settings apart at their braces and spaces.
    ask "${overrides[@]}" --write="$run_dir/launch/config.yaml" || exit
    config=$run_dir/launch/config.yaml
    if is_done; then
        say "the run in $run_dir is done already"
        exit 0
    fi
    check_launcher
    missing=$(missing_hosts)
    [[ -z $missing ]] || fail 2 "$missing: not to be reached without a password, or $project, $python or $config is \
not there; try \`ssh HOST ls $project\`, and share the folder"
    cores=$(on_host "${hosts[0]}" <<<nproc) # this machine may be another kind
    is_number "$cores" || cores=1
    source launch/env.sh
    unset MYTHOS_LAUNCH
    launch=$(hostname)-$$-$(date +%s)
    export MYTHOS_BAD_NODES=$run_dir/launch/bad_nodes MYTHOS_VERDICT=$run_dir/launch/verdict DS_ENV_FILE
    export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}} MASTER_PORT LOCAL_WORLD_SIZE=$ranks_per_node MYTHOS_SECRET_FILE
    make_secret
    DS_ENV_FILE=$(mktemp)
    export PDSH_SSH_ARGS_APPEND="$ssh_options ${PDSH_SSH_ARGS_APPEND:-}"
    export HYDRA_LAUNCHER_EXTRA_ARGS=$ssh_options OMPI_MCA_plm_rsh_args=$ssh_options # mpich, openmpi
    rm -f "$run_dir/STOP"
    trap clean_up EXIT
    local signal
    for signal in INT TERM USR1 HUP; do
        trap "on_signal $signal" "$signal"
    done
    while :; do
        say "start on ${#hosts[@]} hosts x $ranks_per_node ranks through $launcher, run $run_dir"
        start
        wait_for_it
        decide
        wait_for_hosts
        [[ ! -e $run_dir/STOP ]] || { say "stopped" && exit 85; }
    done
}

main "$@"
