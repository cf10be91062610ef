"""Tells what its process is like, for a comparison of ways to start one."""

import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import stat
import sys
from pathlib import Path

import helper
import numpy
import torch
import torch.distributed as dist


def facts():
    """What must not depend on what has started this process."""
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "main": sys.modules["__main__"].__spec__.name,
        "path": sys.path,
        "flags": repr(sys.flags),
        "environ": sorted(os.environ),
        "files": sorted(map(kind, Path("/proc/self/fd").iterdir())),
        "stdin": os.readlink("/proc/self/fd/0"),
        "leads": (os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()),
        "directory": os.getcwd(),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "signals": {number.name: repr(signal.getsignal(number)).partition(" at ")[0] for number in signal.Signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "umask": umask(),
        "log": (logging.root.level, len(logging.root.handlers), faulthandler.is_enabled()),
        "garbage": gc.get_threshold(),
        "main process": (multiprocessing.current_process().name, multiprocessing.parent_process() is None),
        "torch threads": torch.get_num_threads(),
        "cuda": (torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()),
        "collective": total(),
        "helper": helper.NAME,
        "mark": mark() == os.environ["MINSERVE_WORKER"],
    }


def kind(path):
    """What a file descriptor is of, without numbers and the names of this start."""
    try:
        target = os.readlink(path)
    except OSError:
        return "the folder itself"
    return target.partition(":")[0] if ":" in target else os.path.basename(target)


def umask():
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


def total():
    if not dist.is_initialized():
        return 0.0
    one = torch.ones(1)
    dist.all_reduce(one)
    return one.item()


def mark():
    """The worker's name as others see it."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    return next(entry for entry in entries if entry.startswith(b"MINSERVE_WORKER=")).partition(b"=")[2].decode()


def children():
    """What comes of processes that a handler starts."""
    loaded = torch.utils.data.DataLoader(torch.arange(8), num_workers=2, batch_size=4)
    with multiprocessing.get_context("spawn").Pool(1) as spawned:
        power = spawned.apply(pow, (2, 5))
    return [int(batch.sum()) for batch in loaded] + [power]


def lost():
    """How many of this process's files are others in a process that it forks. A library may have pipes of its own there."""
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    open_now = [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    mine = {number: os.fstat(number) for number in open_now}
    forked = os.fork()
    if forked == 0:
        os._exit(sum(os.fstat(n).st_ino != one.st_ino for n, one in mine.items() if not stat.S_ISFIFO(one.st_mode)))
    code = os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])
    for number in free:
        os.close(number)
    return code


def die(how):
    if how == "exit":
        sys.exit(7)
    os.kill(os.getpid(), signal.Signals[how])


class Facts:
    def initialize(self, context):
        self.rank = int(os.environ["RANK"])
        if int(os.environ["WORLD_SIZE"]) > 1:
            dist.init_process_group("gloo")

    def handle(self, data, context):
        asked = data[0]["body"]
        if asked == "children":
            mine = children()
        elif asked == "lost":
            mine = lost()
        elif asked == "chance":
            mine = [random.random(), float(numpy.random.rand()), float(torch.rand(1))]
        elif asked in ("SIGKILL", "SIGSEGV", "exit"):
            mine = die(asked) if self.rank == 1 else None  # the other one waits for it below
        else:
            mine = facts()
        ranks = [mine]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        return [json.dumps(ranks)]
