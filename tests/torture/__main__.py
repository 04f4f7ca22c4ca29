"""`python -m tests.torture --budget 90m`: spend the budget, continue the ledger, write RELIABILITY.md."""
import argparse
import re
import sys

from . import battery


def seconds(text: str) -> float:
    "90m, 2h, 30s or plain seconds"
    found = re.fullmatch(r"([\d.]+)([smh]?)", text)
    if not found: raise argparse.ArgumentTypeError(f"{text!r} is no duration; say 90m, 2h or 300s")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
parser.add_argument("--budget", type=seconds, default="90m")
parser.add_argument("--only", help="ids, separated by commas: T1,T4")
parser.add_argument("--list", action="store_true", help="name the tests and end")
parser.add_argument("--report", action="store_true", help="write RELIABILITY.md from the ledger and end")
args = parser.parse_args()
if args.list:
    for t in battery.trials(): print(f"{t.id:10} goal {t.goal:>6}  {t.title}")
    sys.exit()
ledger = battery.Ledger(battery.ROOT / ".torture" / "ledger.json")
failed = 0
try:
    if not args.report: failed = battery.spend(args.budget, ledger, set(args.only.split(",")) if args.only else None)
finally: (battery.ROOT / "RELIABILITY.md").write_text(battery.report(ledger))
sys.exit(bool(failed))
