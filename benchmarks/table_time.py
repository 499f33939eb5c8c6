"""Time of the 13B table, a share of the 0.1 s it may take: ``python benchmarks/table_time.py``.

Pure Python on 644 parameters; no torch is imported.
"""

import json
import sys
import time

from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import base_dims, get_preset

LIMIT_S = 0.1


def main() -> None:
    preset = get_preset("cerebras-gpt-13b")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        parametrize(preset.shape, base_dims(preset.base), preset.hparams, preset.rule)
        times.append(time.perf_counter() - start)
    assert "torch" not in sys.modules
    median = sorted(times)[len(times) // 2]
    print(json.dumps({"median_s": round(median, 5), "share_of_limit": round(median / LIMIT_S, 3)}))


if __name__ == "__main__":
    main()
