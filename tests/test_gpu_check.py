import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PARTS = {"exactness": 3, "training": 5, "tokens/s": 2, "step": 12}  # lines of each


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU: run it by itself")
def test_gpu_check_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "tests/gpu_check.py"), str(tmp_path / "found.json")]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=one, text=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    versions = found.pop("machine")
    assert {part: len(lines) for part, lines in found.items()} == PARTS
    failed = [line for lines in found.values() for line in lines.values() if "failed" in line]
    assert not failed and done.returncode == 0 and "0 failed" in done.stdout
    assert versions["torch"] in done.stdout
