"""`python -m tests.torture --budget 90m`: spend the budget, continue the ledger, write RELIABILITY.md."""
import argparse
import os
import re
import sys

from . import battery


def seconds(text: str) -> float:
    "90m, 2h, 30s or plain seconds"
    found = re.fullmatch(r"([\d.]+)([smh]?)", text)
    if not found: raise argparse.ArgumentTypeError(f"{text!r} is no duration; say 90m, 2h or 300s")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
parser.add_argument("--budget", type=seconds, default="90m", help="how long: 90m, 2h, 300s")
parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1),
                    help="processes at once (default: one a core, at most 4)")
parser.add_argument("--only", help="ids, separated by commas: T1,T4")
parser.add_argument("--list", action="store_true", help="name the tests and end")
parser.add_argument("--report", action="store_true", help="write RELIABILITY.md from the ledger and end")
parser.add_argument("--again", metavar="ID", help="run the failed cases of a test again and settle those that pass")
parser.add_argument("--why", help="with --again: the cause that was found, a sentence for the report")
args = parser.parse_args()
if bool(args.again) != bool(args.why): parser.error("--again and --why go together: say what the cause was")
if args.list:
    for t in battery.trials(): print(f"{t.id:10} goal {t.goal:>6}  {t.title}")
    sys.exit()
os.environ["OMP_NUM_THREADS"] = "1"
battery.hear_interrupts()
ledger, failed = battery.Ledger(), 0
try:
    if args.again: failed = battery.again(args.again, args.why, ledger)
    elif not args.report:
        failed = battery.spend(args.budget, ledger, set(args.only.split(",")) if args.only else None, args.jobs)
finally: (battery.ROOT / "RELIABILITY.md").write_text(battery.report(ledger))
sys.exit(bool(failed))
