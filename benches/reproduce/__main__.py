"""`python -m reproduce` in benches/: fine-tuning against distillation across tokenizers, on small models made here."""

import argparse
import sys

from reproduce import reproduce
from xtokmap import XTokMapError


def main() -> int:
    p = argparse.ArgumentParser("reproduce", description=__doc__)
    p.add_argument("--quick", action="store_true", help="four methods in one arrangement on two seeds")
    p.add_argument("--output", default="runs/reproduce", help="folder for models, runs and tables; finished runs stay")
    p.add_argument("--teachers", help="folder with trained teachers; those that are not there are trained")
    p.add_argument("--workers", type=int, help="processes, one thread each; as many as there are cores if not given")
    args = p.parse_args()
    try:
        folder = reproduce(args.output, quick=args.quick, teachers=args.teachers, workers=args.workers)
    except XTokMapError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    print((folder / "reproduction.md").read_text(encoding="utf-8"))
    print(f"this table (reproduction.md), its plots and every run are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
