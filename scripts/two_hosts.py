"""Trains on two "hosts", network namespaces of this machine, through torchrun, and compares with one process.

    sudo python scripts/two_hosts.py [--out FOLDER] [--kill]

Each namespace has one end of a virtual cable and nothing else: what the processes tell each other crosses it. The run
is that of one process with the same global batch; weights, losses and counts are compared, and photos are explained by
both hosts into one folder. With --kill the second host is killed during training, and the run is gone on with.

Linux, root (for the namespaces), gloo; needs `ip` (iproute2).
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

HOSTS = ("va-host0", "va-host1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29477
TIMEOUT = 600

# A ViT without batch norms and dropout: what differs is rounding alone.
CONFIG: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "options": {"depth": 2, "embed_dim": 48, "num_heads": 3},
        "optim": {"lr": 0.001, "warmup_epochs": 0.5},
    },
    "data": {
        "source": "shapes",
        "image_size": 32,
        "batch_size": 8,
        "num_workers": 0,
        "crop_pct": 1.0,
        "train_transforms": ["HorizontalFlip"],
        "options": {"size": 32, "train": 128, "validation": 61, "test": 61},
    },
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "num_nodes": 2, "devices": 1, "strategy": "ddp"},
    "evaluation": {"mistakes": 0},
}


def sh(*command: str) -> None:
    """Runs a command that has to succeed."""
    subprocess.run(command, check=True, timeout=60)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Sets up two namespaces with a cable between them, and removes them."""
    try:
        for host in HOSTS:
            sh("ip", "netns", "add", host)
        sh("ip", "link", "add", "va0", "netns", HOSTS[0], "type", "veth", "peer", "name", "va1", "netns", HOSTS[1])
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            sh("ip", "-n", host, "addr", "add", f"{address}/24", "dev", f"va{number}")
            sh("ip", "-n", host, "link", "set", f"va{number}", "up")
            sh("ip", "-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            end(host)
            subprocess.run(["ip", "netns", "del", host], check=False, timeout=60)


def start(host: int, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Starts `vision-attn` through torchrun on a host; what it says goes to a file."""
    command = [
        *("ip", "netns", "exec", HOSTS[host], sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1"),
        *("--master-addr", ADDRESSES[0], "--master-port", str(PORT), "-m", "vision_attn.cli", *arguments),
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"va{host}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def both(*arguments: str, folder: Path, name: str) -> list[int]:
    """Returns the exit codes of a command on both hosts."""
    logs = [folder / f"{name}-host{host}.log" for host in range(2)]
    started = [start(host, *arguments, log=log) for host, log in enumerate(logs)]
    try:
        return [process.wait(TIMEOUT) for process in started]
    finally:
        for host in HOSTS:
            end(host)


def end(host: str) -> None:
    """Kills all that runs on a host."""
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=False, timeout=60)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def alone(*arguments: str) -> None:
    """Runs `vision-attn` in one process of this machine."""
    command = [sys.executable, "-m", "vision_attn.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=TIMEOUT, env=environment, stdout=subprocess.DEVNULL)


def compare(ours: Path, reference: Path) -> list[str]:
    """Returns what two runs have in common, in lines."""
    lines = []
    for name in ("last.ckpt", "best.ckpt"):
        one, two = (_weights(run / "checkpoints" / name) for run in (ours, reference))
        apart = {key: (one[key].double() - two[key].double()).abs() for key in two}
        # A key's bias has no gradient but rounding, from which Adam makes steps as large as any other: nothing moves.
        keys = {key: found.chunk(3)[1].clone() for key, found in apart.items() if key.endswith("attn.qkv.bias")}
        for key in keys:
            apart[key].chunk(3)[1].zero_()
        rest, of_keys = (max(float(found.max()) for found in group.values()) for group in (apart, keys))
        lines.append(f"weights of {name}: {len(two)} tensors, at most {rest:.1e} apart, the keys' biases {of_keys:.1e}")
    results = [json.loads((run / "val.json").read_text()) for run in (ours, reference)]
    same = results[0]["confusion"] == results[1]["confusion"]
    lines.append(f"validation: {results[0]['correct']} and {results[1]['correct']} of {results[1]['total']} right")
    lines.append(f"confusion matrices: {'the same' if same else 'DIFFERENT'}")
    logs = [list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (ours, reference)]
    for key in ("train/loss", "val/loss", "val/top1"):
        values = [[float(row[key]) for row in log if row.get(key)] for log in logs]
        lines.append(f"{key}: at most {max(abs(a - b) for a, b in zip(*values, strict=True)):.1e} apart")
    return lines


def _weights(path: Path) -> dict[str, Any]:
    import torch

    return {
        key: value
        for key, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items()
        if value.is_floating_point()
    }


def kill_and_go_on(folder: Path, config: Path) -> list[str]:
    """Returns what happened when the second host was killed during training, and the run gone on with."""
    run = folder / "killed"
    arguments = ("fit", "--config", str(config), "--run_dir", str(run))
    logs = [folder / f"killed-host{host}.log" for host in range(2)]
    started = [start(host, *arguments, log=log) for host, log in enumerate(logs)]
    try:
        until = time.monotonic() + TIMEOUT
        while not (run / "checkpoints" / "last.ckpt").is_file():
            if time.monotonic() > until or started[0].poll() is not None:
                raise SystemExit(f"no checkpoint: see {logs[0]}")
            time.sleep(0.05)
        end(HOSTS[1])
        killed = time.monotonic()
        code = started[0].wait(TIMEOUT)
        took = time.monotonic() - killed
    finally:
        for host in HOSTS:
            end(host)
    said = [line for line in logs[0].read_text(errors="replace").splitlines() if line.startswith("vision-attn:")]
    lines = [f"the first host ended {took:.0f} s after the second was killed, with exit code {code}:", *said]
    codes = both("fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", folder=folder, name="gone-on")
    return [*lines, f"gone on with --ckpt_path last on both hosts: exit codes {codes}"]


def explain_on_both(folder: Path, model: Path) -> list[str]:
    """Returns what came of photos that both hosts explained into one folder."""
    generator = np.random.default_rng(0)
    photos = folder / "photos"
    photos.mkdir()
    for number in range(23):
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(photos / f"{number:02}.png")
    out = folder / "explained"
    arguments = ("explain", str(model), str(photos), "--out", str(out), "--method", "rollout", "--batch-size", "4")
    codes = both(*arguments, folder=folder, name="explain")
    files = [row["file"] for row in csv.DictReader((out / "index.csv").read_text().splitlines())]
    wanted = sorted(str(path) for path in photos.iterdir())
    once = "each once" if sorted(files) == wanted else "NOT EACH ONCE"
    return [f"explained on both hosts: exit codes {codes}, {len(files)} of {len(wanted)} photos, {once}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Sets up, runs, compares, cleans up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="a new folder for runs and logs (a temporary one)")
    parser.add_argument("--kill", action="store_true", help="kill the second host during training, too")
    options = parser.parse_args(arguments)
    folder = options.out or Path(tempfile.mkdtemp(prefix="two-hosts-"))
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    one = {**CONFIG, "trainer": {**CONFIG["trainer"], "num_nodes": 1, "strategy": "auto"}}
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    alone("fit", "--config", str(folder / "one.yaml"), "--run_dir", str(folder / "one"), "--data.batch_size", "16")
    with two_hosts():
        codes = both("fit", "--config", str(config), "--run_dir", str(folder / "two"), folder=folder, name="fit")
        print(f"trained on both hosts: exit codes {codes}", flush=True)
        for line in compare(folder / "two", folder / "one"):
            print(f"  {line}", flush=True)
        for line in explain_on_both(folder, folder / "two" / "export"):
            print(line, flush=True)
        if options.kill:
            for line in kill_and_go_on(folder, config):
                print(line, flush=True)
            for line in compare(folder / "killed", folder / "one"):
                print(f"  {line}", flush=True)
    print(f"runs and logs: {folder}")


if __name__ == "__main__":
    main()
