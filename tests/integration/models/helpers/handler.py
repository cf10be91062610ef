"""Starts processes as handlers do, prints, streams and waits, as the request says; on as many ranks as there are."""

import os
import subprocess
import sys
import threading
import time


class Helpers:
    def initialize(self, context):
        self.rank = int(os.environ["RANK"])
        self.ranks = int(os.environ["WORLD_SIZE"])
        if os.environ.get("HELPERS_AT_LOAD"):
            self.helper({})
        if self.ranks > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")

    def handle(self, data, context):
        order = data[0]["body"]
        answer = getattr(self, order["do"])(order)
        return answer if order["do"] == "stream" else [answer]

    def echo(self, order):
        return order["text"]

    def sleep(self, order):
        time.sleep(order["seconds"])
        return "slept"

    def helper(self, order):
        """One that has left the rank's process group, and one whose parent has ended."""
        command = ["sleep", str(order.get("seconds", 3600))]
        subprocess.Popen(command, start_new_session=True)
        script = "import os, subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
        subprocess.run([sys.executable, "-S", "-c", script, *command], check=True)
        return "started"

    def collective(self, order):
        """All ranks but the last wait in a collective."""
        import torch
        import torch.distributed as dist

        if self.rank == self.ranks - 1:
            time.sleep(3600)
        dist.all_reduce(torch.ones(1))

    def print(self, order):
        line = "x" * 99
        for _ in range(order["bytes"] // 100):
            print(line)
        return "printed"

    def print_for_ever(self, order):
        def run():
            while True:
                print("on and on")

        threading.Thread(target=run, daemon=True).start()
        return "printing"

    def stream(self, order):
        def chunks():
            for number in range(order["chunks"]):
                yield [f"{number}\n"]
                time.sleep(0.05)

        return chunks()

    def limits(self, order):
        import resource

        return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
