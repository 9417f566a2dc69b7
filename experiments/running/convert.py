"""Make ``records.jsonl.gz`` of a folder's ``runs/*.json``, which are then deleted.

    python -m experiments.running.convert experiments/results

For the published results; it goes when they are converted.
"""

import json
import shutil
import sys
from pathlib import Path

from experiments.running.records import Results


def main(root: Path) -> None:
    """Convert every folder below the root that has runs."""
    for runs in sorted(root.rglob("runs")):
        results = Results(runs.parent)
        for path in sorted(runs.glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            assert record.pop("schema") == 2
            results.save(record)
        results.compact()
        assert len(Results(runs.parent).load()) == len(list(runs.glob("*.json")))
        print(runs.parent, results.path.stat().st_size)
        shutil.rmtree(runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
