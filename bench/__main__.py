"""What the package gains over what people run today, over the best by hand, and how far the machine would go.

    python -m bench              everything, under ten minutes: bench/results/bench.json and bench.md
    python -m bench --quick      every path, in seconds: its times say nothing
    python -m bench --targets --only "[6, 64, 2]"   what targets name, of one shape: under a minute
    python -m bench --base REV   this revision against another, built beside it
    python -m bench --gpu        on a machine with a GPU: bench/results/gpu.json and gpu.md

Exits with 1 where a contestant fails or computes something else; a target that is not met is told, and is no failure.
`python -m bench.plot bench/results/bench.json` draws the plots.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import compare, gpu, report, run, targets, work


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="times, peak memory, targets and counts")
    parser.add_argument("--output", type=Path, default=Path("bench", "results"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="every path, in seconds")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="works with this in their title; may be repeated"
    )
    parser.add_argument("--targets", action="store_true", help="only works that a target names")
    parser.add_argument("--base", metavar="REV", help="compare with this revision")
    parser.add_argument("--gpu", action="store_true", help="tests and timings on a GPU")
    gpu.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    plan = _chosen(parser, chosen)
    chosen.output.mkdir(parents=True, exist_ok=True)
    if chosen.gpu:
        return gpu.run(parser, chosen, chosen.output / "gpu.json")
    if chosen.base:
        return compare.run(chosen.base, plan, chosen.output / "compare.json")
    found = run.report(plan, lambda line: print(line, flush=True))
    (chosen.output / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.output / "bench.md").write_text(report.markdown(found))
    targets_table = report.targets(found["targets"], judged=not found["quick"])
    print(f"\n{targets_table}\n\n{chosen.output / 'bench.md'}: {found['seconds']} seconds")
    print(
        "".join(f"FAILED: {failure}\n" for failure in found["failures"]) or "every contestant computed the same thing"
    )
    return int(bool(found["failures"]))


def _chosen(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> work.Plan:
    """The plan, or those of its works that the options leave."""
    plan = work.quick() if chosen.quick else work.full()
    if not chosen.only and not chosen.targets:
        return plan
    works = targets.works(plan) if chosen.targets else plan.works
    works = [one for one in works if not chosen.only or any(text in str(one) for text in chosen.only)]
    if not works:
        parser.error("no work is called so; they are:\n" + "\n".join(map(str, plan.works)))
    return plan._replace(works=works, whole=False)


if __name__ == "__main__":
    sys.exit(main())
