import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading
from pe_app.common.memory import keep_freed_memory
how, where = sys.argv[1:]
if how == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    held = [b"x" * size for size in (2**20, 2**22, 2**24)]
    b"x" * 2**26
    before = faults()
    for _ in range(4):
        held = [b"x" * size for size in (2**20, 2**22, 2**24)]
        b"x" * 2**26
    print((faults() - before) * resource.getpagesize())
if where == "thread":
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
else:
    use()
"""


def bytes_mapped_anew(how: str, where: str) -> int:
    run = subprocess.run([sys.executable, "-c", SCRIPT, how, where], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_memory_of_a_freed_block_is_used_again_without_asking_the_system(where):
    assert bytes_mapped_anew("kept", where) < 2**25
    assert bytes_mapped_anew("as it is", where) >= 2**26  # else the setting would not be needed
