"""Runs plain.py, unmodified, once for every case, in one process group: a start of torch costs more than a training."""

import contextlib
import gc
import io
import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

folder = Path(sys.argv[1])
cases = json.loads((folder / "cases.json").read_text())
dist.init_process_group("gloo")
rank = dist.get_rank()
dist.init_process_group = dist.destroy_process_group = lambda *_: None
report = {}
for name, (arguments, config) in cases.items():
    os.environ.pop("COMPRESSION_PLUGINS_CONFIG", None)
    if config is not None:
        os.environ["COMPRESSION_PLUGINS_CONFIG"] = json.dumps(config)
    sys.argv = ["plain.py", *arguments]
    out, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            runpy.run_path(str(Path(__file__).with_name("plain.py")), run_name="__main__")
            gc.collect()  # the session's last line belongs to this case
    except BaseException:
        print(f"in {name}:\n{said.getvalue()[-4000:]}", file=sys.stderr)
        raise
    report[name] = {**(json.loads(out.getvalue()) if rank == 0 else {}), "said": said.getvalue()}
    torch.compiler.reset()
    if len(report) == 1:
        gc.freeze()  # torch's own objects: looking through them again takes longer than a case
torch.save(report, folder / f"report{rank}.pt")
dist.barrier()
