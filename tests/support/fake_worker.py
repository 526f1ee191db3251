"""Stands in for cnnfast_kernels.aot.worker: python -m tests.support.fake_worker ARCH. What it answers to a
description is written in the kernel's name.

It starts in a fraction of the time, because it imports nothing.
"""

import json
import os
import sys
import time

for line in sys.stdin:
    name = json.loads(line)["kernel"].rpartition(":")[2]
    if name.startswith("dies"):
        print("out of memory, say", file=sys.stderr)
        os._exit(3)
    if name.startswith("hangs"):
        time.sleep(120)
    print(json.dumps("it does not compile" if name.startswith("wrong") else None), flush=True)
