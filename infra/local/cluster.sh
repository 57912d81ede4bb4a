#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, with a token, to try what a job does on a cluster.
#
#   infra/local/cluster.sh up [FOLDER] [NODES] [CPUS]    a head without work, and NODES nodes (2) of CPUS each (1)
#   . FOLDER/env                                         the address and the token, for segue submit
#   infra/local/cluster.sh add FOLDER NODE [CPUS]        another node; NODE is its number
#   infra/local/cluster.sh kill FOLDER NODE              a node ends without warning, like a preempted machine
#   infra/local/cluster.sh down [FOLDER]                 ends what `up` has started, and nothing else
#
# FOLDER (default: .cluster) gets the token, the process ids and the logs. The ports are open on all interfaces, as
# Ray's always are. The token protects them.
set -euo pipefail

action=${1:-}
folder=${2:-.cluster}
nodes=${3:-2} # of add and kill: which
cpus=${4:-1}

say() { echo "$*" >&2; }

free_port() {
    python - <<'PYTHON'
import socket

with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    print(found.getsockname()[1])
PYTHON
}

# start NAME COMMAND...: in a session of its own, so that all its processes can be ended together.
start() {
    local name=$1
    shift
    setsid "$@" >"$folder/$name.log" 2>&1 </dev/null &
    echo $! >"$folder/$name.pid"
}

wait_for() {
    local what=$1
    shift
    for _ in $(seq 120); do
        if "$@" >/dev/null 2>&1; then
            return
        fi
        sleep 1
    done
    say "$what did not come up; see $folder/*.log"
    exit 1
}

has_node() { grep -q "Ray runtime started" "$folder/node-$1.log"; }

join() {
    start "node-$1" ray start --block --address="127.0.0.1:$(cat "$folder/port")" --num-cpus="$cpus" --num-gpus=0 \
        --node-ip-address=127.0.0.1 --dashboard-agent-listen-port=0 --disable-usage-stats
    wait_for "node $1" has_node "$1"
}

add() {
    folder=$(cd "$folder" && pwd)
    # shellcheck source=/dev/null
    . "$folder/env"
    join "$1"
    say "added: node $1"
}

up() {
    umask 077
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    if ls "$folder"/*.pid >/dev/null 2>&1; then
        say "$folder has a cluster; end it first: $0 down $folder"
        exit 1
    fi
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token"
    local port dashboard
    port=$(free_port)
    dashboard=$(free_port)
    cat >"$folder/env" <<ENV
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$folder/token"
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
ENV
    # shellcheck source=/dev/null
    . "$folder/env"
    export RAY_JOB_STOP_WAIT_TIME_S=30 # time for a cancelled job to write its last note
    export RAY_USAGE_STATS_ENABLED=0
    # Not in $folder, because a socket's path has at most 107 characters. Has prom_metrics_service_discovery.json.
    mktemp -d >"$folder/temp"
    start head ray start --head --block --port="$port" --num-cpus=0 --num-gpus=0 --temp-dir="$(cat "$folder/temp")" \
        --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --dashboard-agent-listen-port=0 --metrics-export-port="$(free_port)" --disable-usage-stats
    wait_for "the head" ray job list --address "$RAY_API_SERVER_ADDRESS"
    echo "$port" >"$folder/port"
    for node in $(seq "$nodes"); do
        join "$node" # one after the other, else they may take each other's ports
    done
    say "up: . $folder/env"
}

vanish() {
    pkill -KILL -s "$(cat "$folder/node-$1.pid")"
    rm -f "$folder/node-$1.pid"
    say "killed: node $1"
}

down() {
    for file in "$folder"/node-*.pid "$folder"/head.pid; do
        [ -e "$file" ] || continue
        kill -TERM -- "-$(cat "$file")" 2>/dev/null || true
        rm -f "$file"
    done
    if [ -e "$folder/temp" ]; then rm -rf "$(cat "$folder/temp")"; fi
    say "down: $folder"
}

case $action in
up) up ;;
add) add "${3:?which node}" ;;
kill) vanish "${3:?which node}" ;;
down) down ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
