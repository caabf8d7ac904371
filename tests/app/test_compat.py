"""The server starts without MONAI, which still can be had."""

import subprocess
import sys


def test_the_server_is_imported_without_monai_and_its_stock_tasks():
    program = (
        "import sys, pe_monailabel.server.serving, pe_monailabel.tasks.detection, pe_monailabel.tasks.training_queue\n"
    )
    program += "print([name for name in ('monai', 'mlflow', 'matplotlib', 'sklearn') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_a_stand_in_leaves_no_trace_and_refuses_to_work():
    program = (
        "import importlib.util, sys, pe_monailabel.compat\n"
        "from monailabel.utils.others import generic\n"
        "try:\n    generic.download_url('https://example.org', 'x')\n"
        "except NotImplementedError as error:\n    print(error)\n"
        "print(importlib.util.find_spec('monai').loader.__class__.__name__)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["this server was started without MONAI's download_url", "SourceFileLoader"]


def test_pe_app_serve_starts_without_monai_and_without_torchs_compiler(tmp_path):
    program = (
        "import sys, uvicorn\n"
        "heavy = ('monai', 'mlflow', 'sklearn', 'torch._dynamo')\n"
        "uvicorn.run = lambda *_, **__: print('loaded:', [name for name in heavy if name in sys.modules])\n"
        f"sys.argv = ['pe-app', 'serve', {str(tmp_path)!r}]\n"
        "from pe_app.cli import main\n"
        "main()\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "loaded: []" in told.stdout.splitlines(), told.stdout + told.stderr
