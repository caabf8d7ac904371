import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from pe_app.allocation import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * 2**26
before = faults()
for _ in range(4):
    b"x" * 2**26
print((faults() - before) * resource.getpagesize())
"""


def bytes_mapped_anew(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told")
def test_memory_of_a_freed_block_is_used_again_without_asking_the_system():
    assert bytes_mapped_anew("kept") < 2**24
    assert bytes_mapped_anew("as it is") >= 2**26  # else the setting would not be needed
