"Every Python process with this folder on PYTHONPATH dies at the crash point of its environment."

import os
import sys

if "CRASH_AT" in os.environ:
    from crash_hook import OnImport

    sys.meta_path.insert(0, OnImport())
