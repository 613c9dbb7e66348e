"""Plan a run before paying for it: ``irlfast plan CONFIG.yaml --gpus 8xH100-80G --nodes 4``.

It estimates the memory of each GPU by part, the time of each step and phase, the cost in GPU-hours, and the disk.
No weight is loaded: the model's config is enough. Figures are a model's, not measurements (docs/scaling.md).
"""

import sys

from irlfast.common.command import run_command
from irlfast.common.files import InputError, home_path
from irlfast.config.read import config_file, make_config, make_parser, parse_arguments, read_yaml

SHOWN = ("model_name_or_path", "config_name", "dtype", "zero_stage", "use_peft", "gradient_checkpointing")


def command() -> None:
    parser = make_parser(
        "irlfast plan",
        usage="%(prog)s [CONFIG.yaml | RECIPE] [--gpus 8xH100-80G] [--nodes N] [--calibrate RUN] [key=value]...",
        description="Estimate memory, time, cost and disk of a run. All keys of `irlfast train` are read.",
        listed=SHOWN,
    )
    parser.add_argument("config", nargs="?", help="A YAML file of keys, or a name that `irlfast recipes` lists.")
    parser.add_argument("--gpus", help="GPUs per node, as 8xH100-80G (default: this machine, one process).")
    parser.add_argument("--nodes", type=int, default=1, help="Nodes of so many GPUs [1].")
    parser.add_argument("--processes", type=int, default=1, help="Processes on this machine, without --gpus [1].")
    parser.add_argument("--calibrate", metavar="RUN", help="A run on the same kind of machine, whose rates are taken.")
    parser.add_argument("--table", action="store_true", help="Print the table of docs/scaling.md, then stop.")
    parsed, typed = parse_arguments(parser, sys.argv[1:])
    if parsed.processes < 1:
        raise InputError(f"--processes: found {parsed.processes}, expected at least 1")
    from irlfast.startup.prepare import quiet

    quiet()
    if parsed.table:
        from irlfast.startup.plan_table import table

        print(table())
        return
    from irlfast.engine.hardware import read_cluster
    from irlfast.startup.plan_show import show_plan

    given = (read_yaml(config_file(parsed.config)) if parsed.config else {}) | typed
    run = home_path(parsed.calibrate) if parsed.calibrate else None
    cluster = read_cluster(parsed.gpus, parsed.nodes) if parsed.gpus else None
    processes = cluster.processes if cluster else parsed.processes
    show_plan(make_config(given | {"num_processes": processes}), cluster, processes, run)


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
