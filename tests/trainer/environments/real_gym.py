"""Starts NeMo Gym's own servers on loopback, without Ray: for a Python with nemo-gym 0.4.0; they end with its stdin.

Prints the head server's address once it is told where the servers are; they get ready later.
"""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SERVERS = {
    "mcqa": {},
    "math_with_judge": {
        "should_use_judge": False,
        "judge_model_server": {"type": "responses_api_models", "name": "policy_model"},
        "judge_responses_create_params": {"input": []},
    },
    "reasoning_gym": {},
}
# Ray would listen on all of the machine's addresses; none of these servers asks it for anything.
SERVER = """
import runpy, sys
import nemo_gym.server_utils as utils
utils.initialize_ray = lambda: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HEAD = "import time, nemo_gym.server_utils as utils; utils.HeadServer.run_webserver(); time.sleep(10**6)"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> None:
    spec = find_spec("resources_servers")
    folder = Path(next(iter(spec.submodule_search_locations)))
    head = free_port()
    config = {"head_server": {"host": "127.0.0.1", "port": head}, "dry_run": False}
    for name, more in SERVERS.items():
        place = {"entrypoint": "app.py", "domain": "other", "host": "127.0.0.1", "port": free_port(), "num_workers": 1}
        config[name] = {"resources_servers": {name: {**place, **more}}}
        agent = {"entrypoint": "app.py", "resources_server": {"type": "resources_servers", "name": name}}
        config[f"{name}_simple_agent"] = {"responses_api_agents": {"simple_agent": agent}}
    environ = {**os.environ, "NEMO_GYM_CONFIG_DICT": json.dumps(config)}
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([sys.executable, "-c", HEAD], env=environ, **silent)]
    for name in SERVERS:
        command = [sys.executable, "-c", SERVER, str(folder / name / "app.py")]
        own = {**environ, "NEMO_GYM_CONFIG_PATH": name}
        processes.append(subprocess.Popen(command, env=own, cwd=folder / name, **silent))
    try:
        print(f"http://127.0.0.1:{head} {folder}", flush=True)
        sys.stdin.read()
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
