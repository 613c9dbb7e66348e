"""The end of a script that a test starts in several processes."""

import json
from typing import Any

from irlfast.common import dist
from irlfast.engine.process_group import destroy_process_group


def print_results(results: dict[str, Any]) -> None:
    """Print the main process's results as a line of JSON, and leave the process group."""
    if dist.is_main():
        print(json.dumps(results))
    dist.barrier()
    destroy_process_group()
