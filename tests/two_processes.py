"""Programs that tests run in two gloo processes, by the configuration files of examples/distributed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[1] / "examples" / "distributed"
# arguments that run a sub-command of this package
VARIDEPTH = ("-m", "varidepth.cli.main")


def run_two(log: Path, *program: str, config: str | None = "ddp.yaml", seconds: int = 900) -> str:
    """What two processes of a program print, which also stands in `log`; raises with it if they do not end well.

    Args:
        log: file to write.
        program: what stands behind `accelerate launch` or `torchrun`.
        config: of accelerate; `None` for torchrun.
        seconds: after which they are stopped.
    """
    if config is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    else:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / config)]
        small = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(_free_port())]
        command = [*launch, *small, *program]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment = kept | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    printed = log.read_text()
    assert code == 0, printed[-6000:]
    return printed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
