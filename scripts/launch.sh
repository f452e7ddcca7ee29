# Sourced by the recipes, from the project's root: the launch they have in common. docs/clusters.md explains the variables.
#   DATA, OUTPUT              required; a relative path counts from where the recipe was called
#   GPUS, NODES               GPUs of each machine, machines; every recipe has the published numbers as default
#   NODE_RANK, MASTER_ADDR    with several machines: the number of this one (0 ...), the name of number 0
#   MASTER_PORT               another port than 29500: for a second run on the same machine
#   DRY_RUN=1                 print the command, run nothing

fail() { echo "error: $*" >&2; exit 2; }

# scripts/ablations/ set `recipe`: they call a recipe with one switch
recipe=${recipe:-scripts/$(cd "$OLDPWD" && cd "$(dirname "$0")" && basename "$PWD")/$(basename "$0")}
dry_run=$([ "${DRY_RUN:-0}" = 0 ] || echo yes)

for name in DATA OUTPUT; do
    value=${!name:-}
    [ -n "$value" ] || fail "$name is not set; $recipe runs as: $(sed -n 's/^# *\(DATA=\)/\1/p' "$recipe")"
    case $value in /*) ;; *) printf -v "$name" %s "$OLDPWD/$value" ;; esac
done
for name in GPUS NODES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: give a whole number above 0"
done
[ -d "$DATA" ] || [ "$dry_run" ] || fail "DATA=$DATA: no such folder"

# launch run_x.py FLAGS...: one process on each of NODES x GPUS GPUs, or the command on stdout with DRY_RUN=1.
launch() {
    local run
    if [ "$NODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        fail "$NODES machines: MASTER_ADDR must be the name of machine 0 on all of them (NODES=1 runs on this one alone)"
    fi
    if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then # srun has started one process a GPU: there is nothing left to launch
        [ "$SLURM_STEP_NUM_TASKS" -eq $((NODES * GPUS)) ] ||
            fail "srun started $SLURM_STEP_NUM_TASKS tasks, but NODES x GPUS is $NODES x $GPUS: one task a GPU is expected"
        run=(python)
    else
        run=(torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --master_port "${MASTER_PORT:-29500}")
        if [ "$NODES" -gt 1 ]; then
            [[ ${NODE_RANK:-} =~ ^[0-9]+$ && $NODE_RANK -lt $NODES ]] ||
                fail "NODE_RANK=${NODE_RANK:-}: each of the $NODES machines needs its own number, 0 to $((NODES - 1))"
            run+=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
        fi
    fi
    run+=("$@")
    if [ "$dry_run" ]; then
        printf '%q ' "${run[@]}"
        echo
        return
    fi
    command -v "${run[0]}" > /dev/null || fail "${run[0]} is not on the PATH: activate the environment with torch first"
    exec "${run[@]}"
}
